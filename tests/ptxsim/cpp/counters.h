// Counters that depend on addresses: 32-byte sectors of global memory, bank conflicts of shared memory.
#pragma once
#include "state.h"

// Whether this access of the warp has not touched the sector yet. Open addressing is enough: 32 lanes of at most 32 bytes
// cover at most 64 sectors of the 256 places.
INLINE bool first_touch(Ctx& ctx, u64 sector) {
  for (u32 h = (u32)(sector * 0x9E3779B1u) >> 24;; h = (h + 1) & 255) {
    if (ctx.sector_stamp[h] != ctx.stamp) {
      ctx.sector_stamp[h] = ctx.stamp;
      ctx.sector_key[h] = sector;
      return true;
    }
    if (ctx.sector_key[h] == sector) return false;
  }
}

INLINE void mark_sector(const Alloc* alloc, u64 sector, bool reads, bool writes) {
  u64 index = sector - (alloc->lo >> 5);
  if (reads && alloc->sector_read) alloc->sector_read[index] = 1;
  if (writes && alloc->sector_written) alloc->sector_written[index] = 1;
}

// Most accesses are free of conflicts, and this finds out without the table of words: all lanes at one place, or each in a
// bank of its own.
INLINE bool one_wavefront(const u64* address, int phase, int lanes_per_phase, u32 mask, int n) {
  int shift = n <= 4 ? 2 : n == 8 ? 3 : 4;
  u32 banks = 0, count = 0;
  u64 first = 0;
  bool same = true;
  for (int l = 0; l < lanes_per_phase; l++) {
    if (!on(mask, l)) continue;
    u64 word = address[phase + l] >> shift;
    banks |= 1u << (word & (u32)(lanes_per_phase - 1));
    if (!count++) first = word;
    else same &= word == first;
  }
  return same || (u32)__builtin_popcount(banks) == count;
}

// The hardware takes accesses of 8 and 16 bytes in two and four phases of the warp; in each, a bank delivers one 4-byte word
// per wavefront, to all lanes that want it.
static void count_banks(Ctx& ctx, const u64* address, int n, u32 mask) {
  if (!ctx.launch->config.stats) return;
  int lanes_per_phase = n <= 4 ? 32 : n == 8 ? 16 : 8;
  u64 wavefronts = 0, ideal = 0;
  for (int phase = 0; phase < 32; phase += lanes_per_phase) {
    u32 active = lanes_per_phase == 32 ? mask : (mask >> phase) & ((1u << lanes_per_phase) - 1);
    if (!active) continue;
    ideal++;
    if (one_wavefront(address, phase, lanes_per_phase, active, n)) {
      wavefronts++;
      continue;
    }
    u8 count[32] = {};
    u32 words[32][32], most = 0;
    for (int l = 0; l < lanes_per_phase; l++) {
      if (!on(active, l)) continue;
      u32 first = (u32)(address[phase + l] >> 2);
      for (int k = 0; k < (n + 3) / 4; k++) {
        u32 word = first + k, bank = word & 31;
        int q = 0;
        while (q < count[bank] && words[bank][q] != word) q++;
        if (q < count[bank]) continue;
        words[bank][count[bank]++] = word;
        if (count[bank] > most) most = count[bank];
      }
    }
    wavefronts += most;
  }
  ctx.stat->wavefronts += wavefronts;
  ctx.stat->ideal_wavefronts += ideal;
}
