# Configures, builds and runs the consumer through WAY = find_package or add_subdirectory.

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE "${WORK}")
file(MAKE_DIRECTORY "${WORK}")
set(library -D "LORA_RITE_SOURCE=${SOURCE}")
if(WAY STREQUAL "find_package")
  run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/staging")
  # The package must work elsewhere, and so must not know where it was built or where LibTorch lay.
  file(RENAME "${WORK}/staging" "${WORK}/prefix")
  file(GLOB_RECURSE package "${WORK}/prefix/share/cmake/*.cmake")
  get_filename_component(torch "${TORCH}/../../.." ABSOLUTE)
  foreach(file IN LISTS package)
    file(READ "${file}" text)
    foreach(path "${SOURCE}" "${BUILD}" "${WORK}" "${torch}")
      string(FIND "${text}" "${path}" at)
      if(NOT at EQUAL -1)
        message(FATAL_ERROR "${file} names a path of this machine: ${path}")
      endif()
    endforeach()
  endforeach()
  set(library -D "lora_rite_ROOT=${WORK}/prefix")

  # Static libraries of another LibTorch are refused.
  file(COPY "${WORK}/prefix/" DESTINATION "${WORK}/other")
  set(config "${WORK}/other/share/cmake/lora_rite/lora_rite-config.cmake")
  file(READ "${config}" text)
  string(REGEX REPLACE "built_for \"[0-9.]*\"" "built_for \"1.9\"" text "${text}")
  file(WRITE "${config}" "${text}")
  execute_process(COMMAND "${CMAKE_COMMAND}" -G "${GENERATOR}" -S "${SOURCE}/tests/package/consumer" -B "${WORK}/refused"
    -D WAY=${WAY} -D "lora_rite_ROOT=${WORK}/other" -D "Torch_DIR=${TORCH}" OUTPUT_QUIET ERROR_VARIABLE said)
  string(REGEX REPLACE "[ \n]+" " " said "${said}") # CMake wraps lines
  if(NOT said MATCHES "lora_rite::cuda was compiled with LibTorch 1\\.9, and LibTorch [0-9.+a-z]* is here")
    message(FATAL_ERROR "a package with static libraries of another LibTorch was not refused: ${said}")
  endif()
endif()

run("${CMAKE_COMMAND}" -G "${GENERATOR}" -S "${SOURCE}/tests/package/consumer" -B "${WORK}/build"
  -D WAY=${WAY} ${library} -D "Torch_DIR=${TORCH}")
run("${CMAKE_COMMAND}" --build "${WORK}/build")
run("${WORK}/build/consumer")
