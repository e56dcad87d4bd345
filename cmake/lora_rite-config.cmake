# find_package(lora_rite): the target lora_rite::lora_rite, with the LibTorch of the machine that asks.
include(CMakeFindDependencyMacro)
list(PREPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_LIST_DIR}")
find_dependency(LibTorch)
list(POP_FRONT CMAKE_MODULE_PATH)
include("${CMAKE_CURRENT_LIST_DIR}/lora_rite-targets.cmake")
