# Read by ctest, with `binary`, `prefix` and `cores` set: one entry for every Google Test suite of the binary.
get_filename_component(_name "${binary}" NAME)
execute_process(COMMAND "${binary}" --gtest_list_tests OUTPUT_VARIABLE _list RESULT_VARIABLE _failed ERROR_QUIET)
if(_failed)
  add_test(${_name}_IS_NOT_BUILT false)
  return()
endif()

# A suite stands at the start of a line and ends in a dot: "Suite.", "Instance/Suite.", "Suite/0.  # TypeParam = float".
# Instances of the same suite share an entry.
string(REGEX MATCHALL "(^|\n)[^ \n]+\\." _suites "${_list}")
list(TRANSFORM _suites STRIP)
list(TRANSFORM _suites REPLACE "/[0-9]+\\.$" ".")
list(TRANSFORM _suites REPLACE "^.*/" "")
list(TRANSFORM _suites REPLACE "\\.$" "")
list(REMOVE_DUPLICATES _suites)
foreach(_suite IN LISTS _suites)
  add_test("${prefix}${_suite}" "${binary}" "--gtest_filter=${_suite}.*:${_suite}/*:*/${_suite}.*:*/${_suite}/*" --gtest_brief=1)
  set_tests_properties("${prefix}${_suite}" PROPERTIES ENVIRONMENT OMP_NUM_THREADS=${cores} PROCESSORS ${cores} TIMEOUT 600)
  if(prefix STREQUAL "cuda.")
    set_tests_properties("${prefix}${_suite}" PROPERTIES SKIP_REGULAR_EXPRESSION "finds no GPU")
  endif()
endforeach()
