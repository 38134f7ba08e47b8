# cmake -DPYOBSERVER_SANITIZE=address …, then run Python with the sanitizer's library in LD_PRELOAD.
if(PYOBSERVER_SANITIZE)
  target_compile_options(pyobserver_flags INTERFACE -fsanitize=${PYOBSERVER_SANITIZE}
                                                    -fno-omit-frame-pointer -g)
  target_link_options(pyobserver_flags INTERFACE -fsanitize=${PYOBSERVER_SANITIZE})
endif()
