#include "distributed/processes.hpp"

int main(int argc, char** argv) { return lora_rite::test::run_tests_or_scenario(argc, argv); }
