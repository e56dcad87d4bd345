#include "cli/train_checks.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cli/options.hpp"
#include "common/text.hpp"

namespace finetune {
namespace {

constexpr int64_t kMaxTimeout = 24 * 60 * 60;

template <class List>
void require_one_of(const List& names, const char* option, const std::string& found) {
  require(std::find(names.begin(), names.end(), found) != names.end(), option, found, join(names));
}

}  // namespace

// Comparisons are written so that NaN fails them.
void check_values(const RunOptions& options) {
  const auto at_least = [](double least, const char* option, double found) {
    require(found >= least && std::isfinite(found), option, found, concat("a number of at least ", least));
  };
  const auto above_zero = [](const char* option, double found) {
    require(found > 0 && std::isfinite(found), option, found, "a number above 0");
  };
  const auto count = [](int64_t least, const char* option, int64_t found) {
    require(found >= least, option, found, concat("at least ", least));
  };
  require(options.max_length >= 3, "--max-length", options.max_length, "at least 3: two special tokens and a word");
  count(0, "--generate", options.generate);

  require_one_of(optimizer_names(), "--optimizer", options.optimizer);
  at_least(0, "--lr", options.lr);
  at_least(0, "--head-lr", options.head_lr);
  at_least(0, "--weight-decay", options.weight_decay);
  require(options.beta2 >= 0 && options.beta2 < 1, "--beta2", options.beta2, "a number in [0, 1)");
  at_least(0, "--max-grad-norm", options.max_grad_norm);
  at_least(0, "--clip", options.clip);
  require(options.preconditioner_exponent >= 0 && options.preconditioner_exponent <= 0.5, "--preconditioner-exponent",
          options.preconditioner_exponent, "a number in [0, 0.5]");
  at_least(0, "--max-relative-change", options.max_relative_change);
  above_zero("--lr-ratio-b", options.lr_ratio_b);

  count(1, "--steps", options.steps);
  count(1, "--batch", options.batch);
  count(0, "--micro-batch", options.micro_batch);
  require_one_of(schedule_names(), "--schedule", options.schedule);
  require(options.warmup >= 0 && options.warmup <= options.steps, "--warmup", options.warmup,
          "0 to the number of --steps");
  require(options.min_lr_ratio >= 0 && options.min_lr_ratio <= 1, "--min-lr-ratio", options.min_lr_ratio,
          "a number in [0, 1]");
  count(0, "--evaluate-every", options.evaluate_every);
  count(0, "--patience", options.patience);

  count(1, "--rank", options.rank);
  above_zero("--alpha", options.alpha);
  require(options.dropout >= 0 && options.dropout < 1, "--dropout", options.dropout, "a number in [0, 1)");
  require_one_of(init_names(), "--init", options.init);
  above_zero("--init-scale", options.init_scale);

  require_one_of(std::vector<std::string>{"float32", "bfloat16"}, "--dtype", options.dtype);
  require_one_of(std::vector<std::string>{"cpu", "cuda"}, "--device", options.device);
  at_least(0, "--memory-limit", options.memory_limit);
  require(options.threads >= 0 && options.threads <= kMaxThreads, "--threads", options.threads, "0 to 1024");
  count(0, "--checkpoint-every", options.checkpoint_every);
  require(options.timeout >= 1 && options.timeout <= kMaxTimeout, "--timeout", options.timeout, "1 to 86400");
  count(1, "--log-every", options.log_every);
}

void check_combinations(const RunOptions& options) {
  if (options.schedule == "constant" && options.min_lr_ratio != 0) {
    fail("--min-lr-ratio ", options.min_lr_ratio,
         ": a constant rate has none; leave it out, or choose linear or cosine");
  }
  if (options.patience > 0 && options.validation.empty()) {
    fail("--patience ", options.patience, ": there is nothing to be measured; add --validation");
  }
  if (options.patience > 0 && options.evaluate_every == 0) {
    fail("--patience ", options.patience, ": measured is only after the last step; add --evaluate-every");
  }
  if (options.evaluate_every > 0 && options.validation.empty() && options.test.empty()) {
    fail("--evaluate-every ", options.evaluate_every, ": there is nothing to be measured; add --validation or --test");
  }
  if (options.generate > 0 && options.test.empty()) {
    fail("--generate ", options.generate, ": there are no prompts; add --test");
  }
  if (options.init_scale != 1 && options.init != "kaiming" && options.init != "gaussian") {
    fail("--init-scale ", options.init_scale, ": --init ", options.init,
         " makes it another start, because B is not zero; leave it out, or choose kaiming or gaussian");
  }
}

}  // namespace finetune
