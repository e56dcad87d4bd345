#pragma once

#include <ATen/core/ivalue.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>

#include "workloads/workload.hpp"

namespace finetune {

/// The best measurement so far, and how many since then were no better. All of it lies in the values of a checkpoint.
class BestSoFar {
 public:
  /// Before the first measurement; loading other `values` brings it to where they were saved.
  BestSoFar(Headline headline, std::map<std::string, c10::IValue>& values)
      : headline_(std::move(headline)), values_(values) {
    const double infinity = std::numeric_limits<double>::infinity();
    values_ = {{"best_score", headline_.higher_is_better ? -infinity : infinity},
               {"best_step", int64_t{0}},
               {"measurements_since_best", int64_t{0}}};
  }

  /// Takes the scores after a step into account and returns whether they are the best. Where one is no number, as the
  /// loss of a model that has diverged, none is worth anything: accuracy counts such a model's first class as its
  /// answer.
  bool take(const Scores& scores, int64_t step) {
    const double found = score_of(scores, headline_.score);
    const bool diverged = std::any_of(scores.begin(), scores.end(), [](const auto& s) { return std::isnan(s.second); });
    if (diverged || !headline_.improves(found, score())) {
      values_["measurements_since_best"] = measurements_since() + 1;
      return false;
    }
    values_["best_score"] = found;
    values_["best_step"] = step;
    values_["measurements_since_best"] = int64_t{0};
    return true;
  }

  const std::string& name() const { return headline_.score; }
  double score() const { return values_.at("best_score").toDouble(); }
  int64_t step() const { return values_.at("best_step").toInt(); }  ///< 0 = none was any good
  int64_t measurements_since() const { return values_.at("measurements_since_best").toInt(); }

 private:
  Headline headline_;
  std::map<std::string, c10::IValue>& values_;
};

}  // namespace finetune
