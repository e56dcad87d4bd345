#include "targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lora_rite::fuzz::adapter_config({reinterpret_cast<const char*>(data), size});
  return 0;
}
