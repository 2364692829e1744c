// xorshift64*: choices of a run that its seed decides.
#pragma once

namespace twin {

class Random {
  public:
    explicit Random(u64 seed = 1) {
        // splitmix64, so that neighbouring seeds have nothing in common.
        u64 mixed = seed + 0x9e3779b97f4a7c15ull;
        mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9ull;
        mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebull;
        state_ = (mixed ^ (mixed >> 31)) | 1;
    }
    u64 next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545f4914f6cdd1dull;
    }
    u32 below(u32 bound) { return static_cast<u32>((next() >> 32) * bound >> 32); }
    bool chance(u32 wins, u32 of) { return below(of) < wins; }

  private:
    u64 state_;
};

}  // namespace twin
