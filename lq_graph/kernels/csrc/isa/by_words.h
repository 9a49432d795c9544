// The step of MultiplySlice that multiplies four bytes of a row of w, in all lanes, by those of kPanel
// rows of x. isa/neon.h has others.
#ifndef LQ_GRAPH_ISA_BY_WORDS_H_
#define LQ_GRAPH_ISA_BY_WORDS_H_
#include <cstdint>

namespace {

constexpr int64_t kStepBytes = 4;  // bytes of a row of w in a step
constexpr int kTogether = 1;       // rows of w whose sums DotStep computes together

// Adds a step's products to the sums of kTogether columns by one panel of x.
template <bool int4>
INLINE_TARGET void DotStep(Ints* sums, const Ints* w, const Ints* x) {
  *sums = Dot<int4>(*sums, *w, *x);
}
// Brings the sums of kTogether columns into the order of the rows.
INLINE_TARGET void OrderSums(Ints*) {}
// Brings a register of each row of a panel of x into the order that DotStep takes.
INLINE_TARGET void OrderX(Ints* rows) { Transpose(rows); }
// The same for a packed slice of w.
INLINE_TARGET void OrderW(uint8_t*, int64_t, int64_t) {}

}  // namespace

#endif  // LQ_GRAPH_ISA_BY_WORDS_H_
