# pyobserver._autograd: against torch's C++ API, so of one version of torch, and the only part that
# may fail to compile under another; pip builds it last, and does without it.
pybind11_add_module(_autograd MODULE csrc/autograd/autograd.cpp)
target_include_directories(_autograd SYSTEM PRIVATE ${PYOBSERVER_TORCH_INCLUDE})
target_link_libraries(_autograd PRIVATE pyobserver_flags ${PYOBSERVER_TORCH_LIB}/libtorch_cpu.so
                                        ${PYOBSERVER_TORCH_LIB}/libc10.so)
set_target_properties(_autograd PROPERTIES EXCLUDE_FROM_ALL ON)
install(TARGETS _autograd LIBRARY DESTINATION pyobserver OPTIONAL)
