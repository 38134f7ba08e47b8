# pyobserver_torch: the headers of the installed torch and the library of its stable ABI.
#
# torch is looked for with the interpreter that will run it, without being imported. Inside pip's
# build isolation that interpreter is still the user's, and only PYTHONPATH hides its packages,
# hence -I and -E. find_package(Torch) is not used: it brings CUDA's own search with it.
set(PYOBSERVER_TORCH_TARGET 2.10)
set(target_version 0x020a000000000000)

set(probe
    "import importlib.util, pathlib
spec = importlib.util.find_spec('torch')
print(pathlib.Path(spec.origin).parent if spec and spec.origin else '')")
foreach(flag IN ITEMS "" -I -E)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${flag} -c "${probe}"
    OUTPUT_VARIABLE torch_dir
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(torch_dir AND EXISTS ${torch_dir}/version.py)
    break()
  endif()
  unset(torch_dir)
endforeach()
if(NOT torch_dir)
  message(FATAL_ERROR "pyobserver builds against an installed torch, and none was found: "
                      "install torch first")
endif()

file(STRINGS ${torch_dir}/version.py version_line REGEX "^__version__")
string(REGEX REPLACE ".*'(.*)'.*" "\\1" PYOBSERVER_TORCH_VERSION "${version_line}")
if(PYOBSERVER_TORCH_VERSION VERSION_LESS PYOBSERVER_TORCH_TARGET)
  message(FATAL_ERROR "pyobserver needs torch >= ${PYOBSERVER_TORCH_TARGET}, "
                      "found ${PYOBSERVER_TORCH_VERSION}")
endif()
file(STRINGS ${torch_dir}/version.py cuda_line REGEX "^cuda")
string(REGEX MATCH "[0-9]+\\.[0-9]+" PYOBSERVER_TORCH_CUDA "${cuda_line}")

add_library(pyobserver_torch INTERFACE)
target_include_directories(pyobserver_torch SYSTEM INTERFACE ${torch_dir}/include)
target_compile_definitions(pyobserver_torch INTERFACE TORCH_TARGET_VERSION=${target_version})
target_link_libraries(pyobserver_torch INTERFACE ${torch_dir}/lib/libtorch_cpu.so)
set(PYOBSERVER_TORCH_LIB ${torch_dir}/lib)
set(PYOBSERVER_TORCH_INCLUDE ${torch_dir}/include)
