// What a factorisation ΔW = BA does to each optimizer: how far its ΔW strays when training starts from an equivalent
// pair (TA, BT⁻¹), and how much of a layer's change either factor contributes as the layer grows wider.

#include "laboratory.hpp"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace lora_rite::laboratory;

const std::vector<std::pair<Kind, const char*>> kinds = {
    {Kind::Scaling, "scaling"}, {Kind::Diagonal, "diagonal"}, {Kind::Rotation, "rotation"}, {Kind::General, "general"}};

void measure_invariance(bool quick, std::ofstream& csv) {
  csv << "optimizer,kind,magnitude,dtype,rate,after_first_step,after_all_steps,way\n";
  const std::vector<double> all = {1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6}, some = {1, 1e2, 1e4};
  for (const auto& [dtype, dtype_name] : {std::pair(torch::kDouble, "double"), std::pair(torch::kFloat, "float")}) {
    for (const auto& [kind, kind_name] : kinds) {
      const std::vector<double> magnitudes = kind == Kind::Rotation ? std::vector<double>{1} : quick ? some : all;
      std::printf("\n%s, %s: difference of dW after %d steps / way\n%-12s", kind_name, dtype_name, kSteps,
                  kind == Kind::Scaling ? "factor" : "condition");
      for (const double magnitude : magnitudes) std::printf(" %8.0e", magnitude);
      std::printf("      way\n");
      for (const std::string& optimizer : contenders()) {
        std::printf("%-12s", optimizer.c_str());
        Invariance result = {};
        for (const double magnitude : magnitudes) {
          result = invariance(optimizer, kind, magnitude, dtype);
          std::printf(" %8.1e", result.after_all_steps);
          csv << optimizer << ',' << kind_name << ',' << magnitude << ',' << dtype_name << ','
              << learning_rate(optimizer) << ',' << result.after_first_step << ',' << result.after_all_steps << ','
              << result.way << '\n';
        }
        std::printf(" %8.2f\n", result.way);
      }
    }
  }
}

void measure_feature_learning(bool quick, std::ofstream& csv) {
  csv << "optimizer,start,exponent,width,rate,of_a,of_b,whole,features\n";
  for (const Setting& setting : settings()) {
    const char* start = setting.start == Start::RandomA ? "random_a" : "random_b";
    std::printf("\n%s, %s, rate %g (64/n)^%g\n%6s %10s %10s %10s %10s %10s\n", setting.optimizer.c_str(), start,
                setting.rate, setting.exponent, "n", "B dA x", "dB A x", "ratio", "whole", "A x");
    std::vector<double> widths, of_a, of_b, ratio, whole, features;
    for (int64_t width = 64; width <= (quick ? 1024 : 8192); width *= 2) {
      const Contributions c = contributions(setting, width);
      widths.push_back(c.width);
      of_a.push_back(c.of_a);
      of_b.push_back(c.of_b);
      ratio.push_back(c.of_a / c.of_b);
      whole.push_back(c.whole);
      features.push_back(c.features);
      std::printf("%6.0f %10.2e %10.2e %10.2e %10.2e %10.2e\n", c.width, c.of_a, c.of_b, c.of_a / c.of_b, c.whole,
                  c.features);
      csv << setting.optimizer << ',' << start << ',' << setting.exponent << ',' << c.width << ',' << c.rate << ','
          << c.of_a << ',' << c.of_b << ',' << c.whole << ',' << c.features << '\n';
    }
    std::printf("%6s %10.2f %10.2f %10.2f %10.2f %10.2f\n", "slope", slope(widths, of_a), slope(widths, of_b),
                slope(widths, ratio), slope(widths, whole), slope(widths, features));
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Invariance of every optimizer to the factorisation, and feature learning of wide layers.");
  std::string out;
  bool quick = false;
  app.add_option("--out", out, "folder for invariance.csv and feature_learning.csv")->required();
  app.add_flag("--quick", quick, "fewer condition numbers and widths");
  CLI11_PARSE(app, argc, argv);

  torch::set_num_threads(1);  // the matrices are small
  std::filesystem::create_directories(out);
  const std::filesystem::path folder(out);
  std::ofstream of_invariance(folder / "invariance.csv"), of_features(folder / "feature_learning.csv");
  measure_invariance(quick, of_invariance);
  measure_feature_learning(quick, of_features);
  of_invariance.close();
  of_features.close();
  if (!of_invariance || !of_features) {
    std::cerr << "invariance: cannot write into " << out << '\n';
    return 1;
  }
  return 0;
}
