# Settings for our own executables; users of the library get none of them.

set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# LibTorch's headers cost 6-19 s a translation unit, so every object is cached where ccache is installed.
# Its manual asks for this sloppiness with precompiled headers.
find_program(CCACHE ccache)
mark_as_advanced(CCACHE)
set(LORA_RITE_LAUNCHER)
if(CCACHE)
  set(LORA_RITE_LAUNCHER "${CMAKE_COMMAND}" -E env CCACHE_SLOPPINESS=pch_defines,time_macros "${CCACHE}")
endif()
if(NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${LORA_RITE_LAUNCHER})
endif()

# LibTorch's headers are not ours to warn about: LibTorch::torch is imported, hence they are system headers.
add_library(lora_rite_warnings INTERFACE)
target_compile_options(lora_rite_warnings INTERFACE -Wall -Wextra $<$<BOOL:${LORA_RITE_WARNINGS_AS_ERRORS}>:-Werror>)

# It also asks for these options with them.
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  set(_pch_options "SHELL:-Xclang -fno-pch-timestamp")
elseif(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(_pch_options -fpch-preprocess)
endif()

# lora_rite_use_pch(target): what our code uses of LibTorch precompiled, once for all targets that ask. Not the whole of
# torch.h: what its functional forms leave to be instantiated costs every translation unit four seconds more, used or not.
# Not for code that is to show which includes it needs (quickstart, package tests).
function(lora_rite_use_pch target)
  if(NOT TARGET lora_rite_pch)
    file(WRITE "${PROJECT_BINARY_DIR}/pch.cpp" "")
    add_library(lora_rite_pch OBJECT "${PROJECT_BINARY_DIR}/pch.cpp")
    target_link_libraries(lora_rite_pch PRIVATE lora_rite::lora_rite lora_rite_warnings)
    target_precompile_headers(lora_rite_pch PRIVATE
      "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../tests/support/torch.hpp")
    target_compile_options(lora_rite_pch PRIVATE ${_pch_options})
  endif()
  target_precompile_headers(${target} REUSE_FROM lora_rite_pch)
  target_link_libraries(${target} PRIVATE lora_rite_warnings) # a precompiled header wants equal flags
  target_compile_options(${target} PRIVATE ${_pch_options})
endfunction()

# What tests and benchmarks do with CUDA graphs needs CUDA's own headers, which LibTorch's include, and its runtime: the one
# that came with LibTorch's wheel, if there is one. The library needs neither.
add_library(lora_rite_cuda_graphs INTERFACE)
if(LibTorch_HAS_CUDA)
  file(GLOB _wheels "${LibTorch_CONFIG_DIR}/../../../../nvidia/cu*" "${LibTorch_CONFIG_DIR}/../../../../nvidia/cuda_runtime")
  find_path(LORA_RITE_CUDA_INCLUDE crt/host_config.h # cuda_runtime_api.h alone does not compile
    HINTS ${_wheels} "$ENV{CUDA_HOME}" PATHS /usr/local/cuda PATH_SUFFIXES include)
  find_library(LORA_RITE_CUDART NAMES cudart libcudart.so.13 libcudart.so.12 NAMES_PER_DIR
    HINTS ${_wheels} "$ENV{CUDA_HOME}" PATHS /usr/local/cuda PATH_SUFFIXES lib lib64)
  mark_as_advanced(LORA_RITE_CUDA_INCLUDE LORA_RITE_CUDART)
  if(LORA_RITE_CUDA_INCLUDE AND LORA_RITE_CUDART)
    target_include_directories(lora_rite_cuda_graphs SYSTEM INTERFACE "${LORA_RITE_CUDA_INCLUDE}")
    target_link_libraries(lora_rite_cuda_graphs INTERFACE "${LORA_RITE_CUDART}")
    target_compile_definitions(lora_rite_cuda_graphs INTERFACE LORA_RITE_HAS_CUDA_GRAPHS)
  else()
    message(STATUS "No CUDA headers and libcudart here: what concerns CUDA graphs is left out (CUDA_HOME names the toolkit)")
  endif()
endif()

# Programs that start a process group of their own need Gloo's headers: LibTorch's wheel has Gloo compiled in, but without
# them.
find_path(LORA_RITE_GLOO_INCLUDE gloo/config.h)
mark_as_advanced(LORA_RITE_GLOO_INCLUDE)
if(NOT LORA_RITE_GLOO_INCLUDE)
  message(STATUS "No gloo/config.h here (Debian: libgloo-dev): what starts several processes is left out")
endif()

# The oldest standard that LibTorch's headers allow.
set(LORA_RITE_OLDEST_STANDARD 17)
if(LibTorch_VERSION VERSION_GREATER_EQUAL 2.14)
  set(LORA_RITE_OLDEST_STANDARD 20)
endif()

# lora_rite_compile_command(variable compiler standard flag…): a command that compiles the source appended to it, against
# this library and LibTorch, whose headers are system headers. ccache makes an unchanged one free.
function(lora_rite_compile_command variable compiler standard)
  # Of nlohmann-json, which include/lora_rite/io/ needs; the system's own folder must not be named a second time.
  set(_json "$<FILTER:$<TARGET_PROPERTY:nlohmann_json::nlohmann_json,INTERFACE_INCLUDE_DIRECTORIES>,EXCLUDE,^/usr/include$>")
  set(_options "$<TARGET_PROPERTY:LibTorch::torch,INTERFACE_COMPILE_OPTIONS>")
  set(_next "$<SEMICOLON>")
  set(_eigen) # which the library needs with other compilers than GCC and Clang
  if(TARGET Eigen3::Eigen)
    set(_eigen "-isystem$<JOIN:$<TARGET_PROPERTY:Eigen3::Eigen,INTERFACE_INCLUDE_DIRECTORIES>,${_next}-isystem>")
  endif()
  # What may be empty hangs on what is not: CMake 3.31 hands an empty argument on, which GCC takes for a file.
  set(${variable} ${LORA_RITE_LAUNCHER} "${compiler}" -std=c++${standard} ${ARGN}
    "-I${PROJECT_SOURCE_DIR}/include$<$<BOOL:${_json}>:${_next}-isystem$<JOIN:${_json},${_next}-isystem>>"
    ${_eigen}
    "-isystem$<JOIN:$<TARGET_PROPERTY:LibTorch::torch,INTERFACE_INCLUDE_DIRECTORIES>,${_next}-isystem>"
    "-c$<$<BOOL:${_options}>:${_next}${_options}>" PARENT_SCOPE)
endfunction()
