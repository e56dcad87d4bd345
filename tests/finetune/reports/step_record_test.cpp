#include "reports/step_record.hpp"

#include <gtest/gtest.h>

#include <cmath>

namespace finetune {
namespace {

TEST(StepRecord, ScoresAreShownWithTheirErrorsInPercent) {
  EXPECT_EQ(show({{"accuracy", 0.875}, {"accuracy_error", 0.0123}, {"loss", 0.5}}),
            "accuracy 87.5 % (± 1.2), loss 0.5000");
  EXPECT_TRUE(std::isnan(score_of({{"loss", 1}}, "accuracy")));
}

}  // namespace
}  // namespace finetune
