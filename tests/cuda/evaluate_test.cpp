// `finetune eval` on a GPU: the scores of a CPU.

#include "commands/evaluate.hpp"

#include <gtest/gtest.h>
#include <torch/cuda.h>

#include <sstream>

#include "finetune/commands/task_files.hpp"
#include "memory_plan/machine.hpp"

namespace finetune {
namespace {

TEST(CudaEvaluate, ScoresAreThoseOfTheCpu) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "LibTorch finds no GPU";
  for (const std::string name : {"llama", "t5"}) {
    const TemporaryFolder folder;
    const bool encoder_decoder = name == "t5";
    EvaluateOptions options;
    options.model = model_golden(name);
    options.adapter = save_golden_adapter(name, folder / "adapter");
    options.data = {write_texts(folder / "texts.jsonl", tiny_texts(10, 4), encoder_decoder),
                    write_choices(folder / "choices.jsonl", tiny_choices(), encoder_decoder)};
    std::ostringstream ignored;
    const nlohmann::json expected = evaluate_model(options, ignored)["results"];
    options.device = "cuda";
    const nlohmann::json found = evaluate_model(options, ignored)["results"];
    ASSERT_EQ(found.size(), 2U);
    // Products of up to 48 terms, one layer behind the other, in another order.
    const double loss = expected[0]["loss"];
    EXPECT_NEAR(found[0]["loss"].get<double>(), loss, 1e-5 * loss) << name;
    for (const char* score : {"acc", "acc_norm", "acc_bytes"}) EXPECT_EQ(found[1][score], expected[1][score]) << name;
  }
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
  EXPECT_GT(peak_gpu_memory(), 0) << "it was computed there";
#endif
}

}  // namespace
}  // namespace finetune
