# libpyobserver_cuda.so: the CUDA kernels, in a library of their own. Needs nvcc and the stable
# headers alone, so it builds on a machine with a CPU build of torch and no GPU.
set(PYOBSERVER_CUDA_BUILD no)
# why not: said by `python -m pyobserver info`
set(PYOBSERVER_CUDA_NOTE "PYOBSERVER_CUDA=${PYOBSERVER_CUDA}")
set(cuda_wanted ${PYOBSERVER_CUDA})
if(cuda_wanted STREQUAL auto)
  set(cuda_wanted 0)
  if(PYOBSERVER_TORCH_CUDA)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(cuda_wanted 1)
    else()
      set(PYOBSERVER_CUDA_NOTE "no nvcc at the build")
    endif()
  else()
    set(PYOBSERVER_CUDA_NOTE "the torch at the build was without CUDA")
  endif()
endif()

if(cuda_wanted)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)  # and PTX for what comes after
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD ${CMAKE_CXX_STANDARD})
  set(PYOBSERVER_CUDA_BUILD ${CMAKE_CUDA_COMPILER_VERSION})
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
  set(PYOBSERVER_CUDA_NOTE "for ${architectures}")

  file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/ops/*/*.cu)
  add_library(pyobserver_cuda SHARED ${cuda_sources})
  target_link_libraries(pyobserver_cuda PRIVATE pyobserver_torch pyobserver_flags)
  target_compile_definitions(pyobserver_cuda PRIVATE USE_CUDA)
  set_target_properties(pyobserver_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Shared
                                                   CUDA_VISIBILITY_PRESET hidden)
  # The shim's CUDA functions live in libtorch_cuda.so. A CPU build of torch has none: an empty
  # library of that soname records the dependency, and any CUDA build of torch resolves it.
  if(EXISTS ${PYOBSERVER_TORCH_LIB}/libtorch_cuda.so)
    target_link_libraries(pyobserver_cuda PRIVATE ${PYOBSERVER_TORCH_LIB}/libtorch_cuda.so)
  else()
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cpp "")
    add_library(torch_cuda_stub SHARED ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cpp)
    set_target_properties(
      torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY
                                                        ${CMAKE_CURRENT_BINARY_DIR}/stub)
    target_link_libraries(pyobserver_cuda PRIVATE torch_cuda_stub)
  endif()
  target_link_options(pyobserver_cuda PRIVATE LINKER:--no-as-needed)
  install(TARGETS pyobserver_cuda LIBRARY DESTINATION pyobserver)
endif()
