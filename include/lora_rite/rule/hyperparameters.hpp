#pragma once

namespace lora_rite::rule {

/// The numbers of one step: `LoraRiteOptions` without what only LibTorch needs. Ranges and meanings are documented
/// there.
struct Hyperparameters {
  double lr = 1e-3;                      ///< η
  double beta1 = 0.9;                    ///< β₁
  double beta2 = 0.999;                  ///< β₂
  double eps = 1e-8;                     ///< ε
  double eps_root = 0;                   ///< added to the eigenvalues of V + ρI
  double preconditioner_exponent = 0.5;  ///< p
  double weight_decay = 0;               ///< λ
  bool escape = true;
  double clip_unmagnified_norm = 1;  ///< 0 = off
  double max_update_rms = 0;         ///< 0 = off
  double max_relative_change = 0;    ///< τ, 0 = off
  bool row_equilibration = false;
  double lr_ratio_b = 1;  ///< η of B divided by η of A
  bool balance = false;
  bool maximize = false;
};

}  // namespace lora_rite::rule
