# Each kernel source is compiled once per instruction set, with PYOBS_ISA naming the namespace.
# Never -march=native: a wheel must run where it was not built.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(PYOBSERVER_CPU_ISAS baseline avx2 avx512)
  # what torch's own wheels need (oneDNN); without SSE4.1 there is no vector of minima and no rounding
  set(isa_flags_baseline -mssse3 -msse4.1 -msse4.2 -mpopcnt)
  set(isa_flags_avx2 -mavx2 -mfma)
  set(isa_flags_avx512 -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl
                       -mprefer-vector-width=512)
  target_compile_definitions(pyobserver_flags INTERFACE PYOBS_X86_KERNELS)
else()
  set(PYOBSERVER_CPU_ISAS baseline)  # on Arm that has NEON
endif()

function(pyobserver_add_kernels target)
  foreach(isa IN LISTS PYOBSERVER_CPU_ISAS)
    add_library(kernels_${isa} OBJECT ${ARGN})
    target_link_libraries(kernels_${isa} PRIVATE pyobserver_flags)
    target_compile_definitions(kernels_${isa} PRIVATE PYOBS_ISA=${isa})
    # no floating-point exceptions are asked for, so that conditional arithmetic may vectorize
    target_compile_options(kernels_${isa} PRIVATE ${isa_flags_${isa}} -fno-trapping-math
                                                  -fno-math-errno)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:kernels_${isa}>)
  endforeach()
endfunction()
