#pragma once

#include "lora_rite/rule/vocabulary.hpp"

/// What the three acts hand to each other: r×r matrices of one factor X (n×r, gradient G) and its partner Y. R is a
/// root of YᵀY, U = Y R⁺ an orthonormal basis of Y's columns, Ḡ = G R⁺ the unmagnified gradient, M the momentum in that
/// basis. N = M R⁺ᵀ is the same momentum in X's own coordinates. N is what is stored: it does not depend on the root.
///
/// `for_each_field(structs, f)` calls f for every field: whoever joins, splits or copies them need not list the fields.
namespace lora_rite::rule {

/// Act 1's result. C [r, r] are coordinates in which Y is well conditioned. A Gram matrix squares Y's condition number.
/// That is harmless where floats are summed in double, and not for double factors. Their C is the inverse root of YᵀY,
/// accurate to κ²ε; one more root in these coordinates is exact (CholeskyQR2, Yamamoto et al. 2015).
template <class Matrix>
struct Statistics {
  Matrix coordinates;             ///< C, undefined where it is the identity
  Matrix gram;                    ///< (YC)ᵀ (YC)
  Matrix cross;                   ///< (YC)ᵀ Y_old, Y_old being the partner one step ago
  Matrix gradient_gram;           ///< (GC)ᵀ (GC), zero without a gradient; row equilibration scales G's rows
  Matrix unscaled_gradient_gram;  ///< the same with unscaled rows; defined only with row equilibration
  Scalar<Matrix> steps;           ///< how often Y has moved

  template <class Self, class Function>
  static void for_each_field(Self& self, const Function& f) {
    f(self.coordinates), f(self.gram), f(self.cross), f(self.gradient_gram), f(self.unscaled_gradient_gram);
    f(self.steps);
  }
};

/// What is remembered from step to step besides N.
template <class Matrix>
struct Moments {
  Matrix second_moment;         ///< V, in the basis that `inverse_root` belongs to
  Scalar<Matrix> escaped_mass;  ///< ρ
  Matrix inverse_root;          ///< R⁺ of the partner as it was in the last step
  Scalar<Matrix> step;          ///< t, how many gradients this factor has seen

  template <class Self, class Function>
  static void for_each_field(Self& self, const Function& f) {
    f(self.second_moment), f(self.escaped_mass), f(self.inverse_root), f(self.step);
  }
};

/// The geometry of the partner and the gradient seen in it.
template <class Matrix>
struct Unmagnified {
  Matrix inverse_root;            ///< R⁺
  Matrix change;                  ///< Q = Uᵀ Y_old: transports momenta, as N Qᵀ = M_old Pᵀ
  Matrix magnified_gram;          ///< (GC)ᵀ (GC) as act 1 gave it
  Matrix gradient_gram;           ///< ḠᵀḠ, of scaled rows with row equilibration
  Matrix unscaled_gradient_gram;  ///< the same with unscaled rows; defined only with row equilibration
  Matrix damping;                 ///< K of `relative_change_damping`, undefined where nothing is bounded

  template <class Self, class Function>
  static void for_each_field(Self& self, const Function& f) {
    f(self.inverse_root), f(self.change), f(self.magnified_gram), f(self.gradient_gram);
    f(self.unscaled_gradient_gram), f(self.damping);
  }
};

/// What act 3 applies to the rows: M = N·momentum_map + G·gradient_map, N = M R⁺ᵀ, X ← (1−ηλ) X − ηN.
template <class Matrix>
struct Decision {
  Moments<Matrix> moments;
  Matrix momentum_map;  ///< β₁' Qᵀ
  Matrix gradient_map;  ///< (1−β₁') c R⁺ H K, H being ((V + ρI)^{1/2} + εI)^{-1} or `preconditioner_exponent`'s
  Matrix row_map;       ///< c R⁺ H, by which G gives the second moments of rows; defined only with row equilibration

  template <class Self, class Function>
  static void for_each_field(Self& self, const Function& f) {
    Moments<Matrix>::for_each_field(self.moments, f);
    f(self.momentum_map), f(self.gradient_map), f(self.row_map);
  }
};

}  // namespace lora_rite::rule
