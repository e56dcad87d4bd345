#include "reports/progress.hpp"

#include <cmath>
#include <iomanip>
#include <string>

#include "common/text.hpp"

namespace finetune {
namespace {

constexpr double kSmoothing = 0.9;
constexpr int64_t kWidth = 30;

// "=====>    ", kWidth columns.
std::string draw(int64_t step, int64_t total) {
  const auto filled = static_cast<size_t>(kWidth * step / total);
  std::string bar(kWidth, ' ');
  bar.replace(0, filled, filled, '=');
  if (filled < bar.size()) bar[filled] = '>';
  return bar;
}

// "4:07", "1:04:07"
std::string show_time(int64_t seconds) {
  std::ostringstream text;
  if (seconds >= 3600) text << seconds / 3600 << ':' << std::setfill('0') << std::setw(2);
  text << seconds / 60 % 60 << ':' << std::setfill('0') << std::setw(2) << seconds % 60;
  return text.str();
}

}  // namespace

void ProgressBar::update(const StepRecord& record, double elapsed) {
  elapsed_ += elapsed;
  ++updates_;
  if (std::isfinite(record.loss)) {
    loss_ = kSmoothing * loss_ + (1 - kSmoothing) * record.loss;
    loss_weight_ = kSmoothing * loss_weight_ + (1 - kSmoothing);
  }
  ms_step_ = kSmoothing * ms_step_ + (1 - kSmoothing) * record.ms_step;
  tokens_ = kSmoothing * tokens_ + (1 - kSmoothing) * static_cast<double>(record.tokens);
  weight_ = kSmoothing * weight_ + (1 - kSmoothing);
  if (!is_terminal_ && record.step % log_every_ != 0 && record.step != total_steps_) return;

  const double ms_step = ms_step_ / weight_;
  const double left = elapsed_ / static_cast<double>(updates_) * static_cast<double>(total_steps_ - record.step);
  const auto seconds = std::llround(left / 1000);
  std::ostringstream numbers;
  numbers << std::setw(4) << record.step << '/' << total_steps_ << "  loss " << fixed(loss_ / loss_weight_, 4)
          << "  lr " << std::setprecision(3) << record.lr << "  " << fixed(ms_step, 0) << " ms/step  "
          << fixed(1000 * tokens_ / ms_step_, 0) << " tokens/s  ETA " << show_time(seconds);
  if (is_terminal_) {
    // \x1b[?7l … h: a narrow terminal cuts the line instead of wrapping it, after which \r would no longer reach its
    // start. \x1b[K clears what a longer line before has left.
    out_ << concat("\r\x1b[?7l[", draw(record.step, total_steps_), "] ", numbers.str(), "\x1b[K\x1b[?7h") << std::flush;
    line_open_ = true;
  } else {
    out_ << "  " << numbers.str() << std::endl;
  }
}

void ProgressBar::finish() {
  if (line_open_) out_ << std::endl;
  line_open_ = false;
}

}  // namespace finetune
