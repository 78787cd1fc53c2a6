// Rotary embedding: the angles of a step in binary64, and the rotation. Too small a part of a step to need more.
#include "vai/ops.h"

namespace vai {

// sin and cos for a >= 0 below 2^20 or so: pi/2 in three parts (fdlibm's), its kernel polynomials in Horner form.
static void sin_cos(double a, double& sine, double& cosine) {
  constexpr double kTwoOverPi = 6.36619772367581382433e-01, kP1 = 1.57079632673412561417e+00,
                   kP2 = 6.07710050630396597660e-11, kP3 = 2.02226624879595063154e-21, kRound = 6755399441055744.0;
  constexpr double kS[6] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03,  -1.98412698298579493134e-04,
                            2.75573137070700676789e-06,  -2.50507602534068634195e-08, 1.58969099521155010221e-10};
  constexpr double kC[6] = {4.16666666666666019037e-02,  -1.38888888888741095749e-03, 2.48015872894767294178e-05,
                            -2.75573143513906633035e-07, 2.08757232129817482790e-09,  -1.13596475577881948265e-11};
  const double n = (a * kTwoOverPi + kRound) - kRound;
  const double r = ((a - n * kP1) - n * kP2) - n * kP3, z = r * r;
  double ps = kS[5], pc = kC[5];
  for (int i = 4; i >= 0; --i) {
    ps = kS[i] + z * ps;
    pc = kC[i] + z * pc;
  }
  const double s = r + (r * z) * ps, c = (1.0 - 0.5 * z) + (z * z) * pc;
  switch (int64_t(n) & 3) {
    case 0: sine = s, cosine = c; break;
    case 1: sine = c, cosine = -s; break;
    case 2: sine = -s, cosine = -c; break;
    default: sine = -c, cosine = s;
  }
}

void angles(const AnglesArgs& a, int begin, int end) {
  for (int m = begin; m < end; ++m)
    for (int i = 0; i < a.pairs; ++i) {
      double sine, cosine;
      sin_cos(double(a.positions[m]) * a.frequencies[i], sine, cosine);
      float* out = a.out + (size_t(m) * size_t(a.pairs) + size_t(i)) * 2;
      out[0] = float(cosine);
      out[1] = float(sine);
      if (a.magnitude != 1.0f) out[0] = out[0] * a.magnitude, out[1] = out[1] * a.magnitude;
    }
}

void rope(const RopeArgs& a, int begin, int end) {
  const int stride = a.neox ? a.pairs : 1, step = a.neox ? 1 : 2;
  for (int m = begin; m < end; ++m) {
    const float* table = a.angles + size_t(m) * size_t(a.pairs) * 2;
    for (int h = 0; h < a.heads; ++h) {
      const float* x = a.x + size_t(m) * a.ldx + size_t(h) * size_t(a.head_dim);
      float* out = a.out + size_t(m) * a.ldo + size_t(h) * size_t(a.head_dim);
      for (int i = 0; i < a.pairs; ++i) {
        const float x0 = x[i * step], x1 = x[i * step + stride], c = table[2 * i], s = table[2 * i + 1];
        out[i * step] = x0 * c - x1 * s;
        out[i * step + stride] = x0 * s + x1 * c;
      }
      for (int d = 2 * a.pairs; d < a.head_dim; ++d) out[d] = x[d];
    }
  }
}

}  // namespace vai
