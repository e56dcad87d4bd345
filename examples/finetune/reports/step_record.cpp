#include "reports/step_record.hpp"

#include <algorithm>
#include <limits>

#include "common/text.hpp"

namespace finetune {

double score_of(const Scores& scores, const std::string& name) {
  const auto found = std::find_if(scores.begin(), scores.end(), [&](const auto& score) { return score.first == name; });
  return found == scores.end() ? std::numeric_limits<double>::quiet_NaN() : found->second;
}

std::string show(const Scores& scores) {
  std::vector<std::string> parts;
  for (size_t index = 0; index < scores.size(); ++index) {
    const auto& [name, value] = scores[index];
    if (index + 1 < scores.size() && scores[index + 1].first == name + "_error") {
      parts.push_back(name + " " + fixed(100 * value, 1) + " % (± " + fixed(100 * scores[++index].second, 1) + ")");
    } else {
      parts.push_back(name + " " + fixed(value, 4));
    }
  }
  return join(parts);
}

}  // namespace finetune
