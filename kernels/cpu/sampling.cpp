// From logits to tokens without sorting a vocabulary: passes over the row find few candidates, and only those are
// looked at in float64. What a pass leaves out is left out with proof, or else everything is a candidate.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "runtime.h"
#include "sampling.h"

#pragma GCC target("avx2,fma,f16c")
#include "simd.h"

namespace foveate {
namespace {

constexpr int W = 8;
constexpr std::int64_t kBlock = 64;  // values that share one maximum
constexpr int kBuckets = 1024;       // of scores by their distance to the largest
constexpr float kPerNat = 25.6f;     // so many of them; what lies farther than 40 nats is in the last
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef std::uint32_t U __attribute__((vector_size(W * 4)));

struct Law {
  double temperature, top_k, top_p, min_p;
};

struct Key {
  std::int64_t words[3];
};

struct Candidate {
  float value;
  std::int32_t id;
  double mass;  // exp of the distance to the largest score
};

// The order of ranks: larger first, of equals the lower id.
bool ahead(const Candidate& a, const Candidate& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; }

template <class Word>
FOVEATE_INLINE Word mix(Word x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

// The noise word of a token (or of W of them).
template <class Word>
FOVEATE_INLINE Word noise(Word token, const Key& key) {
  Word word = mix<Word>(token + std::uint32_t(key.words[0]));
  word = mix<Word>(word ^ std::uint32_t(key.words[1]));
  return mix<Word>(word + std::uint32_t(key.words[2]));
}

double gumbel(std::uint32_t word) { return -std::log(-std::log((word + 0.5) / 4294967296.0)); }

// The largest value of a block. A type of this file: code of std::vector<float> could be shared with other files.
struct Top {
  float value;
  bool operator<(Top other) const { return value < other.value; }
};
using Tops = std::vector<Top>;

// Of each block of kBlock values.
Tops block_tops(const float* x, std::int64_t n) {
  Tops tops((n + kBlock - 1) / kBlock);
  for (std::size_t block = 0; block < tops.size(); ++block) {
    const std::int64_t start = block * kBlock, stop = std::min(n, start + kBlock);
    vf<W> best = set1<W>(-kInfinity);
    std::int64_t i = start;
    for (; i + W <= stop; i += W) best = max<W>(best, load<W>(x + i));
    float lanes[W], top = -kInfinity;
    std::memcpy(lanes, &best, sizeof best);
    for (float lane : lanes) top = std::max(top, lane);
    for (; i < stop; ++i) top = std::max(top, x[i]);
    tops[block].value = top;
  }
  return tops;
}

std::int64_t first_largest(const float* x, std::int64_t n, const Tops& tops) {
  const auto block = std::max_element(tops.begin(), tops.end());  // the first of equal ones
  std::int64_t i = (block - tops.begin()) * kBlock;
  while (x[i] != block->value && i + 1 < n) ++i;  // ends at n - 1 only for a row of NaN
  return i;
}

bool all_finite(const float* x, std::int64_t n) {
  vf<W> zeros = {};
  std::int64_t i = 0;
  for (; i + W <= n; i += W) zeros += load<W>(x + i) * 0.0f;  // infinity and NaN give NaN, which stays
  float total = sum<W>(zeros);
  for (; i < n; ++i) total += x[i] * 0.0f;
  return total == 0.0f;
}

// One row of logits with its largest value and law.
class Row {
 public:
  Row(const float* x, std::int64_t n, const Law& law, const Key& key)
      : x_(x),
        n_(n),
        law_(law),
        key_(key),
        tops_(block_tops(x, n)),
        best_id_(first_largest(x, n, tops_)),
        best_(x[best_id_]),
        scale_(float(std::min(1 / law.temperature, 3e38))) {}

  std::int64_t draw() {
    if (law_.top_k > 0 || law_.min_p > 0) {
      truncate();
      return race_of_candidates();
    }
    if (law_.top_p < 1) find_last();
    return race();
  }

 private:
  double mass(float value) const { return std::exp((double(value) - best_) / law_.temperature); }

  // Gathers all values that are at least `cut`.
  void gather(float cut) {
    candidates_.clear();
    for (std::size_t block = 0; block < tops_.size(); ++block) {
      if (tops_[block].value < cut) continue;
      const std::int64_t start = block * kBlock, stop = std::min(n_, start + kBlock);
      for (std::int64_t i = start; i < stop; ++i)
        if (x_[i] >= cut) candidates_.push_back({x_[i], std::int32_t(i), mass(x_[i])});
    }
  }

  // The candidates become those that min-p, top-k and top-p leave; at least the first in rank.
  void truncate() {
    const bool floored = law_.min_p > 0, ranked = law_.top_k > 0 && law_.top_k < n_;
    float cut = -kInfinity;
    if (floored) cut = below(best_ + std::log(law_.min_p) * law_.temperature);
    if (ranked) cut = std::max(cut, rank_cut());
    gather(cut);
    if (floored) drop_below(double(best_) / law_.temperature + std::log(law_.min_p));
    if (ranked) keep_first(std::size_t(law_.top_k));
    if (law_.top_p < 1) keep_mass(law_.top_p * weight());
  }

  // Finds the last token in rank that top-p leaves, where nothing else cuts: a histogram of the masses, in float32,
  // finds the bucket it is in, and only that one is put in order.
  void find_last() {
    const std::vector<Total> masses = histogram();
    double total = 0, before = 0;
    for (const Total& bucket : masses) total += bucket.mass;
    const double limit = law_.top_p * total;
    int last = 0;
    while (last + 1 < kBuckets && before + masses[last].mass < limit) before += masses[last++].mass;
    while (masses[last].mass == 0) --last;  // rounding left nothing below; the first bucket has the largest
    candidates_.clear();
    for (std::size_t block = 0; block < tops_.size(); ++block) {
      if (bucket(tops_[block].value) > last) continue;
      const std::int64_t start = block * kBlock, stop = std::min(n_, start + kBlock);
      for (std::int64_t i = start, end; i < stop; i = end) {
        end = std::min(stop, i + W);
        if (end == i + W && !_mm256_movemask_epi8((__m256i)(buckets(load<W>(x_ + i)) == last))) continue;
        for (std::int64_t j = i; j < end; ++j)
          if (bucket(x_[j]) == last) candidates_.push_back({x_[j], std::int32_t(j), mass(x_[j])});
      }
    }
    keep_mass(limit - before);
    last_ = *std::max_element(candidates_.begin(), candidates_.end(), ahead);
  }

  struct Total {
    double mass;
  };

  std::vector<Total> histogram() const {
    std::vector<Total> masses(kBuckets);
    std::int64_t i = 0;
    for (; i + W <= n_; i += W) {
      const vf<W> values = load<W>(x_ + i), weights = exp<W>((values - best_) * scale_);
      const vi<W> places = buckets(values);
      for (int lane = 0; lane < W; ++lane) masses[places[lane]].mass += weights[lane];
    }
    for (; i < n_; ++i) masses[bucket(x_[i])].mass += mass(x_[i]);
    return masses;
  }

  int bucket(float value) const { return int(std::min((best_ - value) * scale_ * kPerNat, kBuckets - 1.0f)); }

  vi<W> buckets(vf<W> values) const {
    const vf<W> place = (best_ - values) * scale_ * kPerNat, end = set1<W>(kBuckets - 1.0f);
    return __builtin_convertvector(place < end ? place : end, vi<W>);
  }

  // A float a little below x, so that rounding never leaves a candidate out.
  static float below(double x) { return float(x - (std::abs(x) * 1e-6 + 1e-30)); }

  // A value that at least top_k values reach: the top_k-th largest of the block maxima.
  float rank_cut() const {
    const std::size_t k = std::size_t(law_.top_k);
    if (k > tops_.size()) return -kInfinity;
    Tops order = tops_;
    std::nth_element(order.begin(), order.end() - k, order.end());
    return order[order.size() - k].value;
  }

  void drop_below(double low) {
    const auto goes = [=](const Candidate& c) { return c.value < best_ && c.value / law_.temperature < low; };
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), goes), candidates_.end());
  }

  void keep_first(std::size_t k) {
    if (k >= candidates_.size()) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + k, candidates_.end(), ahead);
    candidates_.resize(k);
  }

  double weight() const {
    double total = 0;
    for (const Candidate& c : candidates_) total += c.mass;
    return total;
  }

  // Keeps the candidates ahead of which lies less than `limit`: quickselect by mass instead of by count.
  void keep_mass(double limit) {
    std::size_t first = 0, last = candidates_.size();  // those before `first` are kept, those from `last` are not
    double before = 0;                                 // mass of the kept ones
    while (last - first > 1) {
      const auto begin = candidates_.begin();
      const std::size_t middle = first + (last - first) / 2;
      std::nth_element(begin + first, begin + middle, begin + last, ahead);
      double upper = 0;
      for (std::size_t i = first; i < middle; ++i) upper += candidates_[i].mass;
      if (before + upper < limit) {  // the one in the middle has less than the limit ahead of it
        before += upper;
        first = middle;
      } else {
        last = middle;
      }
    }
    candidates_.resize(std::max<std::size_t>(1, last));
  }

  // Takes part in the race for the largest score plus noise. A token whose mass is too small for the rest of its word
  // cannot win, since -log(u) >= 1 - u, and needs no logarithm.
  void enter(std::int64_t id, float value, std::uint32_t word) {
    const double sum = double(value) / law_.temperature + gumbel(word);
    if (winner_ < 0 || sum > lead_ || (sum == lead_ && id < winner_)) {
      lead_ = sum;
      winner_ = id;
      bar_ = std::exp(sum - double(best_) / law_.temperature) * (1 - 1e-4);
    }
  }

  void enter_if_kept(std::int64_t id, std::uint32_t word) {
    if (x_[id] > last_.value || (x_[id] == last_.value && id <= last_.id)) enter(id, x_[id], word);
  }

  std::int64_t race_of_candidates() {
    for (const Candidate& c : candidates_) {
      const std::uint32_t word = noise<std::uint32_t>(c.id, key_);
      if (c.mass >= bar_ * (double(~word) / 4294967296.0)) enter(c.id, c.value, word);
    }
    return winner_;
  }

  std::int64_t race() {
    enter(best_id_, best_, noise<std::uint32_t>(std::uint32_t(best_id_), key_));  // so that the bar is high at once
    constexpr U lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    std::int64_t i = 0;
    for (std::int64_t block = 0; i + W <= n_; ++block) {
      const std::int64_t stop = std::min((block + 1) * kBlock, n_);
      if (tops_[block].value < last_.value) {  // none of it may be drawn
        i = stop;
        continue;
      }
      for (; i + W <= stop; i += W) {
        const U words = noise<U>(lanes + std::uint32_t(i), key_);
        const vf<W> rest = __builtin_convertvector((vi<W>)(~words >> 8), vf<W>) * 0x1p-24f;  // at most 1 - u
        const vf<W> weight = exp<W>((load<W>(x_ + i) - best_) * scale_);
        const auto open = (weight >= rest * float(bar_)) & (load<W>(x_ + i) >= last_.value);
        if (_mm256_movemask_ps((__m256)open))
          for (int lane = 0; lane < W; ++lane)
            if (open[lane]) enter_if_kept(i + lane, words[lane]);
      }
    }
    for (; i < n_; ++i) enter_if_kept(i, noise<std::uint32_t>(std::uint32_t(i), key_));
    return winner_;
  }

  const float* const x_;
  const std::int64_t n_;
  const Law& law_;
  const Key& key_;
  const Tops tops_;
  const std::int64_t best_id_;
  const float best_;
  const float scale_;  // 1 / temperature, but finite: times a distance of 0 it is 0
  std::vector<Candidate> candidates_;
  Candidate last_ = {-kInfinity, std::numeric_limits<std::int32_t>::max(), 0};  // in rank that may be drawn
  std::int64_t winner_ = -1;
  double lead_ = 0, bar_ = 0;  // the winner's score plus noise; and as a mass, a little less
};

}  // namespace

void largest(std::uintptr_t rows, std::int64_t n, std::int64_t vocab, std::uintptr_t ids, std::uintptr_t finite) {
  for_each(n, double(n) * vocab, [=](std::int64_t i) {
    const auto* x = reinterpret_cast<const float* const*>(rows)[i];
    reinterpret_cast<std::int64_t*>(ids)[i] = first_largest(x, vocab, block_tops(x, vocab));
    reinterpret_cast<bool*>(finite)[i] = all_finite(x, vocab);
  });
}

void draw(std::uintptr_t rows, std::int64_t n, std::int64_t vocab, std::uintptr_t laws, std::uintptr_t keys,
          std::uintptr_t ids) {
  for_each(n, double(n) * vocab * 8, [=](std::int64_t i) {
    Row row(reinterpret_cast<const float* const*>(rows)[i], vocab, reinterpret_cast<const Law*>(laws)[i],
            reinterpret_cast<const Key*>(keys)[i]);
    reinterpret_cast<std::int64_t*>(ids)[i] = row.draw();
  });
}

}  // namespace foveate
