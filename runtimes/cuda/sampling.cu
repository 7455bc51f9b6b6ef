// Choosing the next token from logits, by the rule of cobra_edge/decode/sampling.py.
//
// choose_likeliest: grid of any number of blocks of 256 threads, all of them needed for every token. It leaves the first of
// the largest logits in `token`, 1 in `not_finite` where a logit is not finite (else 0), and the largest logit in `top`. With
// a temperature follow choose_weigh (a grid of any number of blocks) and choose_drawn (one block of 512 threads).
//
// Nothing is sorted. Tokens are in order by their logit, largest first, and among equal ones by their number. A weight is
// exp((logit - top) / temperature) as an integer of 2^43ths, computed in float64: sums of them are exact in any order.
// Whichever is looked for (the last of the top-k tokens, the last of those that hold top-p, the one where a random number
// lies) is the first token, in order, at which a running sum reaches a target: found by its logit's bits from the highest to
// the lowest, two at a time.
#include "device.cuh"

namespace sampling {

// What is asked of one choice; in device memory, so that a captured graph serves all.
struct Choice {
    double temperature, top_p, uniform;
    int top_k, unused;
};

constexpr int kScanThreads = 256, kDrawThreads = 512;
constexpr double kOne = 8796093022208.0;  // 2^43: 2^20 tokens of that weight stay below 2^63

// Unsigned integers in the order of floats; 0.0 and -0.0 are equal.
COBRA_DEVICE uint32_t key_of(float v) {
    const uint32_t bits = bits_of(v + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

COBRA_DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a < b ? b : a; }

struct Sums {
    uint64_t v[3];
};

// The sums over all threads of a block of kDrawThreads; `room` is shared memory, one of two in turns.
COBRA_DEVICE Sums over_block(Sums mine, uint64_t* room) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    COBRA_UNROLL
    for (int i = 0; i < 3; ++i) {
        COBRA_UNROLL
        for (int d = 16; d; d >>= 1) mine.v[i] += shuffle_xor(mine.v[i], d);
        if (lane == 0) room[i * (kDrawThreads / 32) + warp] = mine.v[i];
    }
    sync_block();
    COBRA_UNROLL
    for (int i = 0; i < 3; ++i) {
        uint64_t sum = lane < kDrawThreads / 32 ? room[i * (kDrawThreads / 32) + lane] : 0;
        COBRA_UNROLL
        for (int d = 16; d; d >>= 1) sum += shuffle_xor(sum, d);
        mine.v[i] = sum;
    }
    return mine;
}

// A place in the order: all tokens of a larger key, and those of this one up to a number.
struct Place {
    uint32_t key;
    int index;
};

// Tokens up to a place, and how they are weighed.
struct Kept {
    const float* logits;
    const uint64_t* weights;  // null: each counts 1
    int vocab;
    Place last;
    COBRA_DEVICE_MEMBER bool has(uint32_t key, int i) const { return key > last.key || (key == last.key && i <= last.index); }
    COBRA_DEVICE_MEMBER uint64_t weight(int i) const { return weights ? weights[i] : 1; }
};

// Whose shared memory it is: two rooms in turns, so that one barrier a sum is enough.
struct Turns {
    uint64_t* rooms;
    int turn;
    COBRA_DEVICE_MEMBER uint64_t* next() {
        turn ^= 1;
        return rooms + turn * 3 * (kDrawThreads / 32);
    }
};

COBRA_DEVICE uint64_t total_of(const Kept& kept, Turns& turns) {
    Sums sums = {{0, 0, 0}};
    for (int i = threadIdx.x; i < kept.vocab; i += kDrawThreads)
        if (kept.has(key_of(kept.logits[i]), i)) sums.v[0] += kept.weight(i);
    return over_block(sums, turns.next()).v[0];
}

// The first place at which the running sum reaches a target from 1 to the sum of all; *sum becomes the sum there.
COBRA_DEVICE Place reach(const Kept& kept, uint64_t target, Turns& turns, uint64_t* sum) {
    uint32_t key = 0;
    for (int bit = 30; bit >= 0; bit -= 2) {
        Sums sums = {{0, 0, 0}};
        const uint32_t one = 1u << bit;
        for (int i = threadIdx.x; i < kept.vocab; i += kDrawThreads) {
            const uint32_t own = key_of(kept.logits[i]);
            if (own < key + one || !kept.has(own, i)) continue;
            const uint64_t w = kept.weight(i);
            sums.v[0] += w;
            if (own >= key + 2 * one) sums.v[1] += w;
            if (own >= key + 3 * one) sums.v[2] += w;
        }
        sums = over_block(sums, turns.next());
        key += sums.v[2] >= target ? 3 * one : sums.v[1] >= target ? 2 * one : sums.v[0] >= target ? one : 0;
    }
    // Among equals: the largest number such that those before it do not reach the target yet.
    Sums sums = {{0, 0, 0}};
    for (int i = threadIdx.x; i < kept.vocab; i += kDrawThreads) {
        const uint32_t own = key_of(kept.logits[i]);
        if (own > key) sums.v[0] += kept.weight(i);
        if (own == key && kept.has(own, i)) sums.v[1] += 1, sums.v[2] += (uint64_t)i;
    }
    sums = over_block(sums, turns.next());
    const uint64_t before = sums.v[0];
    int index = 0;
    if (sums.v[1] == 1) {
        index = (int)sums.v[2];
    } else {
        for (int bit = 20; bit >= 0; bit -= 2) {
            Sums equals = {{0, 0, 0}};
            const int one = 1 << bit;
            for (int i = threadIdx.x; i < kept.vocab; i += kDrawThreads) {
                const uint32_t own = key_of(kept.logits[i]);
                if (own != key || !kept.has(own, i)) continue;
                const uint64_t w = kept.weight(i);
                if (i < index + one) equals.v[0] += w;
                if (i < index + 2 * one) equals.v[1] += w;
                if (i < index + 3 * one) equals.v[2] += w;
            }
            equals = over_block(equals, turns.next());
            index += before + equals.v[2] < target   ? 3 * one
                     : before + equals.v[1] < target ? 2 * one
                     : before + equals.v[0] < target ? one
                                                     : 0;
        }
    }
    Kept reached = kept;
    reached.last = {key, index};
    *sum = total_of(reached, turns);
    return reached.last;
}

}  // namespace sampling

// found (2 · blocks,) uint64 and arrived, 0, are scratch.
COBRA_KERNEL(256, choose_likeliest)(const float* __restrict__ logits, int vocab, uint64_t* found, unsigned* arrived,
                                    int* token, int* not_finite, float* top) {
    using namespace sampling;
    COBRA_SHARED(room);
    uint64_t* warps = (uint64_t*)(room + 16);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint64_t best = 0, wrong = 0;
    for (int i = blockIdx.x * kScanThreads + threadIdx.x; i < vocab; i += gridDim.x * kScanThreads) {
        const float v = logits[i];
        wrong |= (bits_of(v) & 0x7f800000u) == 0x7f800000u;
        best = larger(best, (uint64_t)key_of(v) << 32 | (0xffffffffu - (uint32_t)i));
    }
    COBRA_UNROLL
    for (int d = 16; d; d >>= 1) {
        best = larger(best, shuffle_xor(best, d));
        wrong |= shuffle_xor(wrong, d);
    }
    if (lane == 0) warps[warp] = best, warps[kScanThreads / 32 + warp] = wrong;
    sync_block();
    if (threadIdx.x == 0) {
        for (int w = 1; w < kScanThreads / 32; ++w) best = larger(best, warps[w]), wrong |= warps[kScanThreads / 32 + w];
        found[2 * blockIdx.x] = best;
        found[2 * blockIdx.x + 1] = wrong;
    }
    if (!last_block(arrived, (unsigned*)room) || threadIdx.x) return;
    best = wrong = 0;
    for (unsigned b = 0; b < gridDim.x; ++b)
        best = larger(best, load_coherent(found + 2 * b)), wrong |= load_coherent(found + 2 * b + 1);
    const int index = (int)(0xffffffffu - (uint32_t)best);
    *token = index;
    *not_finite = wrong != 0;
    *top = logits[index];
}
COBRA_EXPORT(choose_likeliest)

COBRA_KERNEL(256, choose_weigh)(const float* __restrict__ logits, int vocab, const float* __restrict__ top,
                                const sampling::Choice* __restrict__ choice, uint64_t* weights) {
    using namespace sampling;
    for (int i = blockIdx.x * kScanThreads + threadIdx.x; i < vocab; i += gridDim.x * kScanThreads) {
        const double below = (double)logits[i] - (double)*top;  // before the division: it may overflow, to -infinity
        weights[i] = (uint64_t)(exp(below / choice->temperature) * kOne + 0.5);
    }
}
COBRA_EXPORT(choose_weigh)

// Does nothing where a logit is not finite.
COBRA_KERNEL(512, choose_drawn)(const float* __restrict__ logits, const uint64_t* __restrict__ weights, int vocab,
                                const sampling::Choice* __restrict__ choice, const int* __restrict__ not_finite, int* token) {
    using namespace sampling;
    COBRA_SHARED(room);
    if (*not_finite) return;
    Turns turns = {(uint64_t*)room, 0};
    Kept kept = {logits, nullptr, vocab, {0, vocab}};
    uint64_t sum;
    if (choice->top_k > 0 && choice->top_k < vocab) kept.last = reach(kept, (uint64_t)choice->top_k, turns, &sum);
    kept.weights = weights;
    sum = total_of(kept, turns);
    if (choice->top_p < 1.0) {
        const double share = ceil(choice->top_p * (double)sum);
        const uint64_t target = share < 1.0 ? 1 : (uint64_t)share;
        kept.last = reach(kept, target < sum ? target : sum, turns, &sum);
    }
    const uint64_t target = (uint64_t)(choice->uniform * (double)sum) + 1;
    const Place drawn = reach(kept, target < sum ? target : sum, turns, &sum);
    if (threadIdx.x == 0) *token = drawn.index;
}
COBRA_EXPORT(choose_drawn)
