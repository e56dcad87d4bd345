#pragma once

#include <cstdint>
#include <ostream>

#include "reports/step_record.hpp"

namespace finetune {

/// Shows how training goes (loss, learning rate, tokens a second, time left): a bar that is redrawn on a terminal, a
/// line every `log_every` steps elsewhere.
class ProgressBar {
 public:
  ProgressBar(std::ostream& out, bool is_terminal, int64_t total_steps, int64_t log_every)
      : out_(out), is_terminal_(is_terminal), total_steps_(total_steps), log_every_(log_every) {}

  /// `elapsed` milliseconds since the last call, in which there were measurements and checkpoints beside the step.
  void update(const StepRecord& record, double elapsed);

  /// Ends the bar's line, so that other output can follow.
  void finish();

 private:
  std::ostream& out_;
  bool is_terminal_;
  int64_t total_steps_;
  int64_t log_every_;
  bool line_open_ = false;
  double elapsed_ = 0;
  int64_t updates_ = 0;
  // Exponential averages; dividing by their weight makes up for their start at zero. A loss that is no number (a step
  // that was skipped, say) is left out.
  double loss_ = 0;
  double loss_weight_ = 0;
  double ms_step_ = 0;
  double tokens_ = 0;
  double weight_ = 0;
};

}  // namespace finetune
