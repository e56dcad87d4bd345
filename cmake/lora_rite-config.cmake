# find_package(lora_rite): the target lora_rite::lora_rite, and lora_rite::compiled and ::cuda where they were built, with the LibTorch of the machine that asks.
include(CMakeFindDependencyMacro)
list(PREPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_LIST_DIR}")
find_dependency(LibTorch)
list(POP_FRONT CMAKE_MODULE_PATH)
include("${CMAKE_CURRENT_LIST_DIR}/lora_rite-targets.cmake")
if(EXISTS "${CMAKE_CURRENT_LIST_DIR}/lora_rite-cuda-targets.cmake")
  find_package(CUDAToolkit QUIET) # where there is none, the rest is of use
endif()
if(CUDAToolkit_FOUND AND EXISTS "${CMAKE_CURRENT_LIST_DIR}/lora_rite-cuda-targets.cmake")
  include("${CMAKE_CURRENT_LIST_DIR}/lora_rite-cuda-targets.cmake")
endif()
