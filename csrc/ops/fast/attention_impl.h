// Paged attention in the fast kind: queries, keys, weights and values in bfloat16, multiplied in tiles (sums.h says how), the
// rest as in the exact kind. A unit is what it is there.
//
// Scores are sums over the head's elements, mixtures sums over the tokens of a chunk of kAttentionChunk, counted from position
// 0: a token that a query does not see has the weight +0 there, which changes no sum. Values behind the last token of a tile
// are not read: what stands there may be no number.
#pragma once

#include <cstring>

#include "ops/attention/attention_impl.h"

namespace vai {
namespace {

constexpr int kTile = 32;  // queries, tokens or elements that are multiplied at once, in tiles of 16
constexpr int kTileElements = 512, kPairElements = 2 * kTileElements;
static_assert(kFastQueries % kTile == 0);

// What stands where there is no element.
alignas(64) constexpr uint8_t kNothing[64] = {};

// The keys of a page's 32 tokens as tiles: for each 32 elements two of [16 pairs][16 tokens][2].
template <class V, class Tiles, KvType T>
void pack_keys(const Pages& pages, int sequence, int position, int kv_head, int width, uint16_t* out) {
  constexpr size_t kRow = 16 * kKvBytes<T>;
  const int head_dim = pages.head_dim;
  for (int half = 0; half < 2; ++half) {
    const uint8_t* const scales = pages.keys(sequence, position + 16 * half, kv_head);
    const uint8_t* const keys = scales + scale_bytes<T>(head_dim, 16);
    for (int d = 0; d < width; d += 2) {
      uint16_t* const pair = out + size_t(d / kTile * 2 + half) * kTileElements + size_t(d % kTile) * 16;
      if constexpr (T == KvType::kBf16) {
        const uint8_t* const row = keys + size_t(d) * kRow;
        if (d + 2 <= head_dim)
          Tiles::pair(row, pair);
        else
          Tiles::pair(d < head_dim ? row : kNothing, kNothing, pair);
      } else {
        float rows[2][16] = {};
        for (int odd = 0; odd < 2 && d + odd < head_dim; ++odd)
          for (int i = 0; i < 16; i += V::kLanes)
            V::store(rows[odd] + i, V::mul(V::load_i8(keys + size_t(d + odd) * kRow + i),
                                           V::load_bf16(scales + (d + odd) / kKvGroup * 32 + i * 2)));
        Tiles::narrow_pair(rows[0], rows[1], pair);
      }
    }
  }
}

// The values of a page's tokens as tiles, zeros from token `end` on: for each 32 elements two of [16 pairs][16 elements][2],
// `step` apart.
template <class V, class Tiles, KvType T>
void pack_values(const Pages& pages, int sequence, int position, int kv_head, int width, int end, uint16_t* out, size_t step) {
  const int head_dim = pages.head_dim;
  const size_t row_bytes = size_t(head_dim) * kKvBytes<T>;
  const uint8_t* const scales = pages.values(sequence, position, kv_head);
  const uint8_t* const values = scales + scale_bytes<T>(head_dim, kPageTokens);
  for (int t = 0; t < kPageTokens; t += 2) {
    int whole = 0;  // elements that are done
    if constexpr (T == KvType::kBf16) {
      const uint8_t* const even = values + size_t(t) * row_bytes;
      for (; position + t + 2 <= end && whole + kTile <= head_dim; whole += kTile)
        Tiles::pairs(even + whole * 2, even + row_bytes + whole * 2, out + size_t(whole / kTile) * step + size_t(t) * 16);
    }
    for (int d = whole; d < width; d += 16) {
      uint16_t* const pair = out + size_t(d / kTile) * step + size_t(d % kTile / 16) * kTileElements + size_t(t) * 16;
      const int count = head_dim - d < 16 ? (head_dim > d ? head_dim - d : 0) : 16;
      uint8_t cut[2][16 * kKvBytes<T>];  // elements that are not 16
      const uint8_t* row[2] = {kNothing, kNothing};
      for (int odd = 0; odd < 2 && position + t + odd < end; ++odd) {
        row[odd] = values + size_t(t + odd) * row_bytes + size_t(d) * kKvBytes<T>;
        if (count == 16) continue;
        std::memset(cut[odd], 0, sizeof cut[odd]);
        std::memcpy(cut[odd], row[odd], size_t(count) * kKvBytes<T>);
        row[odd] = cut[odd];
      }
      if constexpr (T == KvType::kBf16) {
        Tiles::pair(row[0], row[1], pair);
      } else {
        float rows[2][16] = {};
        for (int odd = 0; odd < 2 && count > 0 && position + t + odd < end; ++odd) {
          const auto scale = V::set1(load_kv_one<KvType::kBf16>(scales + scale_bytes<T>(head_dim, size_t(t + odd)) + d / kKvGroup * 2));
          for (int i = 0; i < 16; i += V::kLanes) V::store(rows[odd] + i, V::mul(V::load_i8(row[odd] + i), scale));
        }
        Tiles::narrow_pair(rows[0], rows[1], pair);
      }
    }
  }
}

// The largest of a query's scores, each times `scale`, which is positive. Those beside what it sees, up to lines of 16, become
// such that their weights are +0.
template <class V>
float highest(float* s, int first, int end, float scale) {
  constexpr int W = V::kLanes, kAtOnce = 4;
  const int begin = first & ~15, last = (end + 15) / 16 * 16;
  for (int t = begin; t < first; ++t) s[t] = -__builtin_inff();
  for (int t = end; t < last; ++t) s[t] = -__builtin_inff();
  typename V::F top[kAtOnce];
  VAI_UNROLL for (int i = 0; i < kAtOnce; ++i) top[i] = V::set1(-__builtin_inff());
  int t = begin;
  for (; t + kAtOnce * W <= last; t += kAtOnce * W)
    VAI_UNROLL for (int i = 0; i < kAtOnce; ++i) top[i] = V::max(V::mul(V::load(s + t + i * W), V::set1(scale)), top[i]);
  for (; t < last; t += W) top[0] = V::max(V::mul(V::load(s + t), V::set1(scale)), top[0]);
  float lanes[kAtOnce * W];
  VAI_UNROLL for (int i = 0; i < kAtOnce; ++i) V::store(lanes + i * W, top[i]);
  float most = lanes[0];
  for (float x : lanes) most = x > most ? x : most;
  return most;
}

// Scores to weights, of the tokens [from, to), whole tiles of one chunk: exp(scale * s[t] - top), rounded, and +0 where the query
// sees nothing. Returns their R16 sum, in which they are not rounded.
template <class V, class Tiles>
float weights_of(const float* s, int from, int to, int first, int end, float scale, float top, uint16_t* out) {
  using F = typename V::F;
  constexpr int W = V::kLanes, H = 16 / W;
  const int begin = first & ~15, last = (end + 15) / 16 * 16;
  F sums[H];
  VAI_UNROLL for (int h = 0; h < H; ++h) sums[h] = V::set1(0.0f);
  auto soften = [&]<int kTokens>(const float* at, float* e) {
    F x[kTokens / W];
    VAI_UNROLL for (int i = 0; i < kTokens / W; ++i) x[i] = V::sub(V::mul(V::load(at + i * W), V::set1(scale)), V::set1(top));
    exp<V>(x);
    VAI_UNROLL for (int i = 0; i < kTokens / W; ++i) sums[i % H] = V::add(sums[i % H], x[i]), V::store(e + i * W, x[i]);
  };
  for (int t = from; t < to;) {
    float e[2 * kTile];
    if (begin <= t && t + 2 * kTile <= last && t + 2 * kTile <= to) {
      soften.template operator()<2 * kTile>(s + t, e);
      Tiles::narrow_line(e, out), Tiles::narrow_line(e + kTile, out + kTile);
      t += 2 * kTile, out += 2 * kTile;
      continue;
    }
    for (int half = 0; half < kTile; half += 16) {
      if (begin <= t + half && t + half < last)
        soften.template operator()<16>(s + t + half, e + half);
      else
        for (int i = half; i < half + 16; ++i) e[i] = 0.0f;
    }
    Tiles::narrow_line(e, out);
    t += kTile, out += kTile;
  }
  float partial[16];
  VAI_UNROLL for (int h = 0; h < H; ++h) V::store(partial + h * W, sums[h]);
  return sum16(partial);
}

// `Tiles::multiply(rows, a, lda, b, groups, c, ldc)`: c [rows][32] = a [rows][32 * groups] times b, for each group two tiles of
// [16 pairs][16 columns][2]. `Tiles::pair(even, odd, out)`: two neighbouring rows of 16 elements as a row of a tile, [16][2];
// `Tiles::pair(rows, out)`: of rows that follow each other; `Tiles::pairs(even, odd, out)`: of rows of 32, the second half in the
// tile behind. What is subnormal is multiplied as a zero. `Tiles::narrow_pair`: the same of rows in binary32, which are rounded;
// `Tiles::narrow_line`: 32 of them in a row.
//
// Up to kFastQueries of one sequence and KV head; `first` and `end` ascend.
template <class V, class Tiles, KvType T>
void attend_fast(const AttentionArgs& a, int sequence, int kv_head, int queries, const Query* query, uint8_t* memory) {
  const int head_dim = a.pages.head_dim, width = (head_dim + kTile - 1) / kTile * kTile, longest = query[queries - 1].end;
  const int begin = query[0].first / kPageTokens * kPageTokens;  // nothing before it is read
  const size_t stride = fast_score_stride(a.context);
  auto* const s = reinterpret_cast<float*>(memory);  // [kFastQueries][stride], as fast_attention_scratch counts
  float *const o = s + kFastQueries * stride, *const chunk = o + kFastQueries * width;  // [kFastQueries][width] each
  auto* const q = reinterpret_cast<uint16_t*>(chunk + kFastQueries * width);            // [kFastQueries][width]
  uint16_t* const weights = q + kFastQueries * width;                                   // [kFastQueries][kFastWeightStride]
  uint16_t* const panel = weights + kFastQueries * kFastWeightStride;                   // what is multiplied with, as tiles
  auto multiply = [&](const uint16_t* left, size_t lda, const uint16_t* right, int groups, float* c, size_t ldc) {
    for (int i = 0; i < queries; i += kTile)
      Tiles::multiply(queries - i < kTile ? queries - i : kTile, left + size_t(i) * lda, lda, right, groups, c + size_t(i) * ldc, ldc);
  };

  std::memset(q, 0, size_t(kFastQueries * width) * 2);
  for (int i = 0; i < queries; ++i)
    for (int d = 0; d < head_dim; ++d) q[i * width + d] = f32_to_bf16_flushed(query[i].q[d]);
  for (int t = begin; t < longest; t += kPageTokens) {
    pack_keys<V, Tiles, T>(a.pages, sequence, t, kv_head, width, panel);
    multiply(q, size_t(width), panel, width / kTile, s + t, stride);
  }
  float l[kFastQueries] = {}, top[kFastQueries], scale = a.scale;
  if (a.softcap != 0.0f) {
    const int last = (longest + 15) / 16 * 16;
    for (float* own = s; own < s + size_t(queries) * stride; own += stride) {
      for (int t = begin; t < last; t += V::kLanes) V::store(own + t, V::mul(V::load(own + t), V::set1(scale)));
      cap_scores<V>(own, begin, last, a.softcap);
    }
    scale = 1.0f;
  }
  for (int i = 0; i < queries; ++i) top[i] = highest<V>(s + size_t(i) * stride, query[i].first, query[i].end, scale);
  for (int i = 0; i < queries * width; ++i) o[i] = 0.0f;
  for (int c = begin / kAttentionChunk * kAttentionChunk; c < longest; c += kAttentionChunk) {
    const int from = c > begin ? c : begin, to = longest - c < kAttentionChunk ? longest : c + kAttentionChunk;
    const int pages = (to - from + kPageTokens - 1) / kPageTokens;
    for (int p = 0; p < pages; ++p)
      pack_values<V, Tiles, T>(a.pages, sequence, from + p * kPageTokens, kv_head, width, longest, panel + size_t(p) * kPairElements,
                               size_t(pages) * kPairElements);
    for (int i = 0; i < queries; ++i) {
      const auto [_, out, first, end] = query[i];
      l[i] = l[i] + weights_of<V, Tiles>(s + size_t(i) * stride, from, from + pages * kPageTokens, first, end, scale, top[i],
                                         weights + size_t(i) * kFastWeightStride);
    }
    for (int d = 0; d < width; d += kTile)
      multiply(weights, kFastWeightStride, panel + size_t(d / kTile * pages) * kPairElements, pages, chunk + d, size_t(width));
    for (int i = 0; i < queries * width; ++i) o[i] = o[i] + chunk[i];
  }
  for (int i = 0; i < queries; ++i)
    for (int d = 0; d < head_dim; ++d) query[i].out[d] = o[i * width + d] / l[i];
}

template <class V, class Tiles>
void attention_fast(const AttentionArgs& a, int unit, uint8_t* scratch) {
  each_queries<kFastQueries>(a, unit, [&](int sequence, int kv_head, int queries, const Query* query) {
    if (a.pages.type == KvType::kBf16)
      attend_fast<V, Tiles, KvType::kBf16>(a, sequence, kv_head, queries, query, scratch);
    else
      attend_fast<V, Tiles, KvType::kQ8_0>(a, sequence, kv_head, queries, query, scratch);
  });
}

}  // namespace
}  // namespace vai
