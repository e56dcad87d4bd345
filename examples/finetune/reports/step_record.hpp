#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace finetune {

/// Results of a measurement by name ("loss", "accuracy", …), in the order in which they are shown. The standard error
/// of one follows it as "accuracy_error".
using Scores = std::vector<std::pair<std::string, double>>;

/// The score called `name`, NaN if there is none.
double score_of(const Scores& scores, const std::string& name);

/// "accuracy 87.3 % (± 0.9), loss 0.3012": shares, which have an error, in percent.
std::string show(const Scores& scores);

/// What is known of one training step.
struct StepRecord {
  int64_t step = 0;         ///< counted from 1
  double loss = 0;          ///< mean loss of the batch, before the step
  double lr = 0;            ///< rate of the factors in this step
  double ms_step = 0;       ///< batch, forward, backward and optimizer
  double ms_optimizer = 0;  ///< the optimizer's step() alone
  int64_t tokens = 0;       ///< read in this step, without padding

  Scores validation = {};  ///< after the step, where it was measured
  Scores test = {};        ///< likewise
};

}  // namespace finetune
