# pyobserver_flags: what every native target is compiled with.
add_library(pyobserver_flags INTERFACE)
set(warnings -Wall -Wextra -Wshadow -Wno-unknown-pragmas)
if(PYOBSERVER_WERROR)
  list(APPEND warnings -Werror)
endif()
target_compile_options(
  pyobserver_flags
  INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${warnings}>
            # the same bytes from every instruction set, thread count and device
            $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>
            $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false>
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-ffp-contract=off>)
if(PYOBSERVER_WERROR)
  target_compile_options(
    pyobserver_flags
    INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>
              $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Werror>)
endif()
