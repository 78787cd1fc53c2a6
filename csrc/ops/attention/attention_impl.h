// Paged attention in the exact kind. A unit is a few consecutive rows of one sequence under one KV head; its queries share
// every reading of K and V, four at a time, and none of them sees what the others do.
#pragma once

#include "vai/math.h"
#include "vai/ops.h"

namespace vai {
namespace {

// Elements as they are stored; those of kQ8_0 are codes, to be multiplied with their scales, which changes no bit of them.
template <class V, KvType T>
inline typename V::F load_kv(const void* p) {
  if constexpr (T == KvType::kBf16)
    return V::load_bf16(p);
  else if constexpr (T == KvType::kQ8_0)
    return V::load_i8(p);
  else
    return V::load((const float*)p);
}
template <KvType T>
constexpr size_t kKvBytes = T == KvType::kBf16 ? 2 : T == KvType::kQ8_0 ? 1 : 4;

template <KvType T>
inline float load_kv_one(const uint8_t* p) {
  if constexpr (T == KvType::kBf16)
    return bf16_to_f32(load_as<uint16_t>(p));
  else if constexpr (T == KvType::kQ8_0)
    return float(load_as<int8_t>(p));
  else
    return load_as<float>(p);
}

// Bytes of scales before the elements of so many tokens.
template <KvType T>
size_t scale_bytes(int head_dim, size_t tokens) {
  return T == KvType::kQ8_0 ? 2 * size_t(kv_scales(head_dim)) * tokens : 0;
}

// scores[q][0..16) of 16 tokens whose keys stand at `keys` as [head_dim][16], after their scales.
template <class V, KvType T, int Q>
void score(const uint8_t* keys, int head_dim, const float* const* q, float scale, float* const* scores) {
  using F = typename V::F;
  constexpr int W = V::kLanes, H = 16 / W;
  F acc[Q][H];
  VAI_UNROLL for (int i = 0; i < Q; ++i) VAI_UNROLL for (int h = 0; h < H; ++h) acc[i][h] = V::set1(0.0f);
  const uint8_t* scales = keys;
  keys += scale_bytes<T>(head_dim, 16);
  for (int d = 0; d < head_dim; scales += 32) {
    const int end = T == KvType::kQ8_0 && d + kKvGroup < head_dim ? d + kKvGroup : head_dim;
    F s[H];
    if constexpr (T == KvType::kQ8_0) VAI_UNROLL for (int h = 0; h < H; ++h) s[h] = V::load_bf16(scales + h * W * 2);
    for (; d < end; ++d, keys += 16 * kKvBytes<T>)
      VAI_UNROLL for (int h = 0; h < H; ++h) {
        F k = load_kv<V, T>(keys + h * W * kKvBytes<T>);
        if constexpr (T == KvType::kQ8_0) k = V::mul(k, s[h]);
        VAI_UNROLL for (int i = 0; i < Q; ++i) acc[i][h] = V::add(acc[i][h], V::mul(V::set1(q[i][d]), k));
      }
  }
  VAI_UNROLL for (int i = 0; i < Q; ++i)
    VAI_UNROLL for (int h = 0; h < H; ++h) V::store(scores[i] + h * W, V::mul(acc[i][h], V::set1(scale)));
}

// o[q][0..head_dim) += e[q][t - from] * v[t] for t in [from, to), values of a page at `values` as [kPageTokens][head_dim],
// after their scales.
template <class V, KvType T, int Q>
void weigh(const uint8_t* values, int head_dim, int from, int to, const float* const* e, float* const* o) {
  using F = typename V::F;
  constexpr int W = V::kLanes, N = 8 / Q * (16 / W) / 2 > 0 ? 8 / Q * (16 / W) / 2 : 1;  // registers per query
  const size_t row = size_t(head_dim) * kKvBytes<T>, tokens = size_t(to - from);
  const uint8_t* scales = values + scale_bytes<T>(head_dim, size_t(from));
  values += scale_bytes<T>(head_dim, kPageTokens) + size_t(from) * row;
  int d = 0;
  for (; d + N * W <= head_dim; d += N * W) {
    F acc[Q][N];
    VAI_UNROLL for (int i = 0; i < Q; ++i) VAI_UNROLL for (int n = 0; n < N; ++n) acc[i][n] = V::load(o[i] + d + n * W);
    const uint8_t *v = values + size_t(d) * kKvBytes<T>, *s = scales;
    for (size_t t = 0; t < tokens; ++t, v += row, s += scale_bytes<T>(head_dim, 1))
      VAI_UNROLL for (int n = 0; n < N; ++n) {
        F x = load_kv<V, T>(v + size_t(n * W) * kKvBytes<T>);
        if constexpr (T == KvType::kQ8_0) x = V::mul(x, V::set1(load_kv_one<KvType::kBf16>(s + (d + n * W) / kKvGroup * 2)));
        VAI_UNROLL for (int i = 0; i < Q; ++i) acc[i][n] = V::add(acc[i][n], V::mul(V::set1(e[i][t]), x));
      }
    VAI_UNROLL for (int i = 0; i < Q; ++i) VAI_UNROLL for (int n = 0; n < N; ++n) V::store(o[i] + d + n * W, acc[i][n]);
  }
  for (; d < head_dim; ++d)
    for (int i = 0; i < Q; ++i) {
      float sum = o[i][d];
      for (size_t t = 0; t < tokens; ++t) {
        float x = load_kv_one<T>(values + t * row + size_t(d) * kKvBytes<T>);
        if constexpr (T == KvType::kQ8_0)
          x = x * load_kv_one<KvType::kBf16>(scales + scale_bytes<T>(head_dim, t) + size_t(d / kKvGroup * 2));
        sum = sum + e[i][t] * x;
      }
      o[i][d] = sum;
    }
}

// s[t] = cap * tanh(s[t] / cap) for t in [begin, end), both multiples of 16.
template <class V>
void cap_scores(float* s, int begin, int end, float cap) {
  for (int t = begin; t < end; t += V::kLanes)
    V::store(s + t, softcapped<V>(V::load(s + t), cap));
}

// Scores to weights: e[t] = exp(s[t] - max) for t in [first, end), 0 on either side from a multiple of 16 to one.
template <class V>
void soften(float* s, int first, int end) {
  using F = typename V::F;
  constexpr int W = V::kLanes;
  const F lowest = V::set1(-__builtin_inff());
  F top = lowest;
  const int begin = first & ~15;
  for (int t = begin; t < first; ++t) s[t] = -__builtin_inff();  // of which exp is 0
  for (int t = begin; t < end; t += W) top = V::max(V::select(V::before(t, end), V::load(s + t), lowest), top);
  float lanes[W];
  V::store(lanes, top);
  float m = lanes[0];
  for (int i = 1; i < W; ++i) m = lanes[i] > m ? lanes[i] : m;
  for (int t = begin; t < (end + 15) / 16 * 16; t += W)
    V::store(s + t, V::select(V::before(t, end), exp<V>(V::sub(V::load(s + t), V::set1(m))), V::set1(0.0f)));
}

// The R16 sum of a chunk's weights.
template <class V>
float chunk_sum(const float* e, int count) {
  constexpr int W = V::kLanes, H = 16 / W;
  typename V::F p[H];
  for (int h = 0; h < H; ++h) p[h] = V::set1(0.0f);
  for (int t = 0; t < count; t += 16)
    for (int h = 0; h < H; ++h) p[h] = V::add(p[h], V::load(e + t + h * W));
  float partial[16];
  for (int h = 0; h < H; ++h) V::store(partial + h * W, p[h]);
  return sum16(partial);
}

// One to four queries of one sequence and KV head. Query i sees the tokens [first[i], end[i]); both ascend with i.
template <class V, KvType T, int Q>
void attend(const AttentionArgs& a, int sequence, int kv_head, const float* const* q, const int* first, const int* end,
            float* const* out, float* scratch) {
  const int width = a.pages.head_dim, padded = (width + 15) / 16 * 16, longest = end[Q - 1], shortest = end[0];
  const int begin = first[0] & ~15;  // nothing before it is read
  float *s[Q], *chunk[Q], *o[Q];
  for (int i = 0; i < Q; ++i) {
    s[i] = scratch + size_t(i) * a.context;
    chunk[i] = scratch + Q * a.context + size_t(2 * i) * size_t(padded);
    o[i] = chunk[i] + padded;
  }
  for (int t = begin; t < longest; t += 16) {
    float* at[Q];
    for (int i = 0; i < Q; ++i) at[i] = s[i] + t;
    score<V, T, Q>(a.pages.keys(sequence, t, kv_head), width, q, a.scale, at);
  }
  if (a.softcap != 0.0f)
    for (int i = 0; i < Q; ++i) cap_scores<V>(s[i], begin, (longest + 15) / 16 * 16, a.softcap);
  for (int i = 0; i < Q; ++i) soften<V>(s[i], first[i], end[i]);
  float l[Q] = {};
  for (int c = begin / kAttentionChunk * kAttentionChunk; c < longest; c += kAttentionChunk) {
    const int chunk_end = longest - c < kAttentionChunk ? longest : c + kAttentionChunk;
    float* sums[Q];  // the first chunk that a query sees something of goes straight to the result
    for (int i = 0; i < Q; ++i) {
      sums[i] = c <= first[i] ? o[i] : chunk[i];
      for (int d = 0; d < padded; ++d) sums[i][d] = 0.0f;
    }
    for (int t = c > begin ? c : begin / kPageTokens * kPageTokens; t < chunk_end; t += kPageTokens) {
      const uint8_t* values = a.pages.values(sequence, t, kv_head);
      const int last = chunk_end - t < kPageTokens ? chunk_end : t + kPageTokens;
      auto alone = [&](int i, int from, int to) {
        const float* e = s[i] + from;
        if (from < to) weigh<V, T, 1>(values, width, from - t, to - t, &e, &sums[i]);
      };
      // All queries see [from, to); before it those see more that come first, behind it those that come last.
      const int to = shortest < t ? t : shortest < last ? shortest : last;
      const int from = first[Q - 1] < t ? t : first[Q - 1] < to ? first[Q - 1] : to;
      for (int i = 0; i < Q - 1; ++i) alone(i, first[i] < t ? t : first[i], from);
      const float* e[Q];
      for (int i = 0; i < Q; ++i) e[i] = s[i] + from;
      if (from < to) weigh<V, T, Q>(values, width, from - t, to - t, e, sums);
      for (int i = 0; i < Q; ++i) alone(i, first[i] < to ? to : first[i], end[i] < last ? end[i] : last);
    }
    for (int i = 0; i < Q; ++i) {
      const int seen = end[i] < chunk_end ? end[i] : chunk_end, from = c > (first[i] & ~15) ? c : first[i] & ~15;
      if (seen <= from) continue;
      const float sum = chunk_sum<V>(s[i] + from, seen - from);
      l[i] = c <= first[i] ? sum : l[i] + sum;
      if (c > first[i])
        for (int d = 0; d < width; ++d) o[i][d] = o[i][d] + chunk[i][d];
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int d = 0; d < width; ++d) out[i][d] = o[i][d] / l[i];
}

template <class V, KvType T>
void attention_unit(const AttentionArgs& a, int unit, float* scratch) {
  const RowTile tile = a.tiles[unit / a.pages.kv_heads];
  const int kv_head = unit % a.pages.kv_heads, shared = a.heads / a.pages.kv_heads;
  const int sequence = a.sequence_of_row[tile.first], queries = tile.rows * shared;
  for (int i = 0; i < queries;) {
    const float* q[kAttentionQueries];
    float* out[kAttentionQueries];
    int first[kAttentionQueries], end[kAttentionQueries];
    const int count = queries - i >= 4 ? 4 : queries - i >= 2 ? 2 : 1;
    for (int j = 0; j < count; ++j) {
      const size_t row = size_t(tile.first + (i + j) / shared);
      const size_t column = size_t(kv_head * shared + (i + j) % shared) * size_t(a.pages.head_dim);
      q[j] = a.q + row * a.ldq + column;
      out[j] = a.out + row * a.ldo + column;
      end[j] = a.positions[row] + 1;
      first[j] = a.window && end[j] > a.window ? end[j] - a.window : 0;
    }
    if (count == 4)
      attend<V, T, 4>(a, sequence, kv_head, q, first, end, out, scratch);
    else if (count == 2)
      attend<V, T, 2>(a, sequence, kv_head, q, first, end, out, scratch);
    else
      attend<V, T, 1>(a, sequence, kv_head, q, first, end, out, scratch);
    i += count;
  }
}

template <class V>
void attention(const AttentionArgs& a, int unit, float* scratch) {
  if (a.pages.type == KvType::kBf16)
    attention_unit<V, KvType::kBf16>(a, unit, scratch);
  else if (a.pages.type == KvType::kQ8_0)
    attention_unit<V, KvType::kQ8_0>(a, unit, scratch);
  else
    attention_unit<V, KvType::kF32>(a, unit, scratch);
}

}  // namespace
}  // namespace vai
