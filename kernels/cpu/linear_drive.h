// How a product is cut and shared among threads, for every form and level; the arithmetic is the policy `Form`'s:
//
//   kRows      most rows that a tile holds in registers
//   kPanels    most panels that it works on at once
//   kGroup     k is padded to a multiple of it; kChunk, of which it is a divisor, is how much k one visit takes
//              where several tiles pass over it
//   kBits      of a weight in memory
//   kStep      how much k one step of a tile takes, which reads 64 bytes of prepared weights
//   row_bytes(k)                     of one packed row of x
//   pack(problem, row, rows, k, to)  packs the rows of one tile
//   tile(rows, panels)               the function that does the arithmetic for so many; `Tiles` makes it from run<>
// and, where `Hooks` does not do:
//   in_place(problem, k)             x where it is packed as it is, or null
//   prepare(visit, panels)           may put other weights in the place of a chunk's, for all tiles that pass over it
//   release()                        what a thread does when its work is done
//
// Few rows stream the weights once from memory, and prefetching is what counts: each visit of a chunk fetches the next
// one, spread over the whole visit. Many rows go through the same loops: a chunk of a panel stays in L1 while all tiles
// of a block of rows pass over it, the block's packed rows stay in L2, a run of panels in L3. Sums are carried from
// chunk to chunk in float32, in the order of k, so a row's result is the same however many others there are.
//
// Include it after `#pragma GCC target(...)`, simd.h and linear.h.
#pragma once
#include "linear_epilogue.h"

namespace foveate {
namespace {

// Part of a tile's work: `k` steps from `k0` on, for some panels side by side. Its size in rows and panels is fixed.
struct Visit {
  const char* x;        // the tile's packed rows, from k = 0
  const char* weights;  // of the first panel, from k0
  std::int64_t panel_bytes;
  const float* scales;  // of the first panel, from k0
  std::int64_t panel_scales;
  float* sums;  // [rows, 16] of the first panel
  std::int64_t panel_sums;
  std::int64_t rows, k0, k, all_k;
  const char* ahead;  // what to prefetch, `ahead_step` bytes further with every 64 bytes of weights
  std::int64_t ahead_step, ahead_panel_bytes;
};
using Tile = void (*)(const Visit&);

struct Hooks {
  static const char* in_place(const Linear&, std::int64_t) { return nullptr; }
  static void prepare(Visit&, std::int64_t) {}
  static void release() {}
};

// The tiles of a policy as its run<rows, panels>, by size: at most R rows, and 1 or P panels.
template <class Form, int R, int P>
struct Tiles : Hooks {
  static constexpr int kRows = R, kPanels = P;

  static Tile tile(std::int64_t rows, std::int64_t panels) {
    static constexpr auto one = table<1>(std::make_index_sequence<R>()), most = table<P>(std::make_index_sequence<R>());
    return (panels == 1 ? one : most)[rows - 1];
  }

 private:
  template <int Panels, std::size_t... Rows>
  static constexpr std::array<Tile, R> table(std::index_sequence<Rows...>) {
    return {Form::template run<int(Rows) + 1, Panels>...};
  }
};

// Memory that a thread keeps from call to call, aligned to cache lines.
class Room {
 public:
  ~Room() { std::free(at_); }
  char* get(std::int64_t bytes) {
    if (bytes > size_) {
      std::free(at_);
      size_ = (bytes + 4095) / 4096 * 4096;
      at_ = static_cast<char*>(std::aligned_alloc(64, size_));
    }
    return at_;
  }

 private:
  char* at_ = nullptr;
  std::int64_t size_ = 0;
};
thread_local Room packed_room, widened_room, sums_room;

constexpr std::int64_t kPackedBytes = 16 << 20;  // of x at a time: stays in L3
constexpr std::int64_t kBlockRows = 288;         // rows of x whose chunk stays in L2
constexpr std::int64_t kAlongBytes = 8192;       // of bfloat16 weights in a visit of a single tile
constexpr std::int64_t kBesideBytes = 2048;      // and of integers, by one row

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <int W, class Form>
class Drive {
 public:
  explicit Drive(const Linear& p)
      : p_(p),
        k_(ceil_div(p.k, Form::kGroup) * Form::kGroup),
        gate_(p.activation == Activation::kSiluGate ? 2 : 1),
        panels_(gate_ * ceil_div(p.n / gate_, kPanel)),
        panel_bytes_(k_ * kPanel * Form::kBits / 8),
        finish_(finisher<W>(p.activation)) {}

  void run() {
    const std::int64_t most = std::max<std::int64_t>(kPackedBytes / Form::row_bytes(k_), kBlockRows);
    const std::int64_t parts = ceil_div(p_.m, most);
    for (std::int64_t part = 0; part < parts; ++part)
      rows_of(p_.m * part / parts, p_.m * (part + 1) / parts - p_.m * part / parts);
  }

 private:
  struct Item {
    std::int64_t block, first, last;  // row block; panels
  };

  std::int64_t tile_row(std::int64_t tile) const { return rows_ * tile / tiles_; }

  void rows_of(std::int64_t row0, std::int64_t rows) {
    row0_ = row0;
    rows_ = rows;
    tiles_ = ceil_div(rows, Form::kRows);
    blocks_ = ceil_div(rows, kBlockRows);
    order();
    const double work = double(rows) * k_ * panels_ * kPanel;
    const int threads = work < 20e3 ? 1 : max_threads();
    run_ = std::max<std::int64_t>(1, std::min<std::int64_t>(8, blocks_ * panels_ / (threads * 6)));
    run_ = ceil_div(run_, Form::kPanels * gate_) * Form::kPanels * gate_;
    pack();
    Queue queue(blocks_ * ceil_div(panels_, run_));
    auto work_off = [&] {
      for (std::int64_t item = queue.take(), next; item >= 0; item = next) {
        next = queue.take();
        visit(item_of(item), next < 0 ? nullptr : weights(item_of(next).first, 0));
      }
      Form::release();
    };
    parallel(threads, work_off);
  }

  // A single tile waits for memory alone, so the order in which it reads counts: on AVX2, up to a third. In bfloat16
  // it runs along each panel, prefetching a page ahead; with integers and one row, long panels are read side by side.
  void order() {
    const auto steps = [](std::int64_t bytes) { return bytes * 8 / (kPanel * Form::kBits); };
    along_ = W == 8 && tiles_ == 1 && Form::kBits == 16;
    const bool beside = W == 8 && rows_ == 1 && Form::kBits < 16 && k_ > Form::kChunk;
    chunk_ = along_ ? steps(kAlongBytes) : beside ? steps(kBesideBytes) : Form::kChunk;
  }

  void pack() {
    x_ = Form::in_place(p_, k_);
    if (x_) return;
    char* to = packed_room.get(rows_ * Form::row_bytes(k_));
    x_ = to;
    for_each(tiles_, double(rows_) * k_ * 2, [&](std::int64_t tile) {
      const std::int64_t row = tile_row(tile);
      Form::pack(p_, row0_ + row, tile_row(tile + 1) - row, k_, to + row * Form::row_bytes(k_));
    });
  }

  Item item_of(std::int64_t item) const {
    const std::int64_t first = item / blocks_ * run_;
    return {item % blocks_, first, std::min(first + run_, panels_)};
  }

  const char* weights(std::int64_t panel, std::int64_t k) const {
    return static_cast<const char*>(p_.data) + panel * panel_bytes_ + k * kPanel * Form::kBits / 8;
  }

  void visit(const Item& item, const char* next_item) const {
    const std::int64_t tile0 = tiles_ * item.block / blocks_, tile1 = tiles_ * (item.block + 1) / blocks_;
    const std::int64_t row = tile_row(tile0), rows = tile_row(tile1) - row;
    auto* sums = reinterpret_cast<float*>(sums_room.get((item.last - item.first) * rows * kPanel * sizeof(float)));
    const std::int64_t k_end = along_ ? chunk_ : k_, panel_end = along_ ? k_ : chunk_;
    for (std::int64_t k0 = 0; k0 < k_end; k0 += chunk_) {
      for (std::int64_t panel = item.first, count; panel < item.last; panel += count) {
        count = item.last - panel >= Form::kPanels ? Form::kPanels : 1;
        for (std::int64_t k = k0; k < k0 + panel_end; k += chunk_) {
          const char* next = k + chunk_ < k0 + panel_end   ? weights(panel, k + chunk_)
                             : panel + count < item.last ? weights(panel + count, k0)
                             : k0 + chunk_ < k_end       ? weights(item.first, k0 + chunk_)
                                                         : next_item;
          chunk(tile0, tile1, panel, count, k, sums + (panel - item.first) * rows * kPanel, next);
        }
      }
    }
    finish_(p_, sums, row0_ + row, rows, item.first, item.last);
  }

  void chunk(std::int64_t tile0, std::int64_t tile1, std::int64_t panel, std::int64_t count, std::int64_t k,
             float* sums, const char* next) const {
    Visit visit;
    visit.k0 = k;
    visit.k = std::min<std::int64_t>(chunk_, k_ - k);
    visit.all_k = k_;
    visit.weights = weights(panel, k);
    visit.panel_bytes = visit.ahead_panel_bytes = panel_bytes_;
    visit.panel_scales = k_ / Form::kGroup * kPanel;
    visit.scales = p_.scales ? p_.scales + panel * visit.panel_scales + k / Form::kGroup * kPanel : nullptr;
    visit.panel_sums = (tile_row(tile1) - tile_row(tile0)) * kPanel;
    const std::int64_t bytes = visit.k * kPanel * Form::kBits / 8;
    visit.ahead_step = next ? std::max<std::int64_t>(bytes / (visit.k / Form::kStep * (tile1 - tile0)), 1) : 0;
    Form::prepare(visit, count);
    for (std::int64_t tile = tile0; tile < tile1; ++tile) {
      const std::int64_t row = tile_row(tile), rows = tile_row(tile + 1) - row;
      visit.rows = rows;
      visit.x = x_ + row * Form::row_bytes(k_);
      visit.sums = sums + (row - tile_row(tile0)) * kPanel;
      visit.ahead = next ? next + bytes * (tile - tile0) / (tile1 - tile0) : visit.weights;
      Form::tile(rows, count)(visit);
    }
  }

  const Linear& p_;
  const std::int64_t k_, gate_, panels_, panel_bytes_;
  const Finish<W> finish_;
  std::int64_t row0_ = 0, rows_ = 0, tiles_ = 0, blocks_ = 0, run_ = 0, chunk_ = 0;
  bool along_ = false;
  const char* x_ = nullptr;
};

}  // namespace
}  // namespace foveate
