# lora_rite::cuda: the kernels of Engine::Cuda for a GPU. Needs a LibTorch for CUDA, and nvcc of the same major version.

if(NOT LibTorch_HAS_CUDA)
  message(FATAL_ERROR "LORA_RITE_BUILD_CUDA: the LibTorch in ${LibTorch_CONFIG_DIR} runs on CPUs alone, expected one for CUDA "
    "with CUDA's libraries")
endif()
get_filename_component(_torch "${LibTorch_CONFIG_DIR}/../../.." ABSOLUTE)
file(STRINGS "${_torch}/lib/libc10_cuda.so" _cudart REGEX "libcudart[-0-9a-f]*\\.so\\.[0-9]+" LIMIT_COUNT 1)
string(REGEX MATCH "libcudart[-0-9a-f]*\\.so\\.([0-9]+)" _cudart "${_cudart}") # -HASH in LibTorch's own archives
set(_wanted "${CMAKE_MATCH_1}")

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "LORA_RITE_BUILD_CUDA: no nvcc here, expected that of CUDA ${_wanted}, as LibTorch has it (CUDACXX names one)")
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90) # cards with fast double precision: A100, H100, and what comes after them
endif()
enable_language(CUDA)
string(REGEX MATCH "^[0-9]+" _found "${CMAKE_CUDA_COMPILER_VERSION}")
if(NOT _found STREQUAL _wanted OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)
  message(FATAL_ERROR "LORA_RITE_BUILD_CUDA: nvcc is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, expected CUDA ${_wanted}, as LibTorch has it, "
    "and 12.1 or later")
endif()
find_package(CUDAToolkit REQUIRED)

# By itself, for no flag of LibTorch's concerns nvcc.
add_library(lora_rite_cuda_kernels OBJECT src/cuda/kernels.cu)
target_compile_features(lora_rite_cuda_kernels PRIVATE cuda_std_17)
target_include_directories(lora_rite_cuda_kernels PRIVATE "${PROJECT_SOURCE_DIR}/include")
target_compile_definitions(lora_rite_cuda_kernels PRIVATE LORA_RITE_DEVICE_RULE)
target_compile_options(lora_rite_cuda_kernels PRIVATE --expt-relaxed-constexpr $<$<CONFIG:>:-O3>)
set_target_properties(lora_rite_cuda_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON)

add_library(lora_rite_cuda STATIC src/cuda/engine.cpp $<TARGET_OBJECTS:lora_rite_cuda_kernels>)
add_library(lora_rite::cuda ALIAS lora_rite_cuda)
set_target_properties(lora_rite_cuda PROPERTIES EXPORT_NAME cuda POSITION_INDEPENDENT_CODE ON)
# The static runtime: a shared one of another minor version could be found before LibTorch's own. Streams and memory are
# common to all copies.
target_link_libraries(lora_rite_cuda PUBLIC lora_rite CUDA::cudart_static)
target_compile_definitions(lora_rite_cuda INTERFACE LORA_RITE_CUDA)
