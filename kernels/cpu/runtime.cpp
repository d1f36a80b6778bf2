#include "runtime.h"

#include <cpuid.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

namespace foveate {

Level level = kNone;

namespace {

sigjmp_buf trapped;
void on_trap(int) { siglongjmp(trapped, 1); }

// Whether `instruction` runs without a trap: on some virtual machines cpuid promises what the hypervisor forbids.
bool runs(void (*instruction)()) {
  struct sigaction handler = {}, before_ill = {}, before_segv = {};
  handler.sa_handler = on_trap;
  sigaction(SIGILL, &handler, &before_ill);
  sigaction(SIGSEGV, &handler, &before_segv);
  volatile bool ran = false;
  if (sigsetjmp(trapped, 1) == 0) {
    instruction();
    ran = true;
  }
  sigaction(SIGILL, &before_ill, nullptr);
  sigaction(SIGSEGV, &before_segv, nullptr);
  return ran;
}

// One instruction of each set, on registers that the probe may spoil.
void try_avx2() { asm volatile("vpaddd %%ymm0, %%ymm0, %%ymm0\n\tvfmadd231ps %%ymm0, %%ymm0, %%ymm0\n\tvzeroupper" ::: "xmm0"); }
void try_avx512() { asm volatile("vpdpbusd %%zmm0, %%zmm0, %%zmm0\n\tvpabsb %%zmm0, %%zmm0\n\tvzeroupper" ::: "xmm0"); }
void try_avx512_bf16() { asm volatile("vdpbf16ps %%zmm0, %%zmm0, %%zmm0\n\tvzeroupper" ::: "xmm0"); }
void try_amx() {
  alignas(64) std::uint8_t config[64] = {1};  // palette 1; 16 rows of 64 bytes in tiles 0 to 2
  for (int tile : {0, 1, 2}) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  asm volatile(
      "ldtilecfg %0\n\ttilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\t"
      "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n\ttdpbssd %%tmm2, %%tmm1, %%tmm0\n\ttilerelease" ::"m"(config));
}

bool bit(unsigned word, int index) { return (word >> index) & 1; }

// Linux gives a process the AMX tile registers only when it asks.
bool allowed_amx() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

Level probe() {
  unsigned a, b, c, d, b7, c7, d7, a71 = 0, unused;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27) || !bit(c, 12) || !bit(c, 29)) return kNone;  // OSXSAVE FMA F16C
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return kNone;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
  if (!bit(b7, 5) || !runs(try_avx2)) return kNone;
  const bool has_512 = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31) && bit(c7, 11);  // F DQ BW VL VNNI
  if (!has_512 || !runs(try_avx512)) return kAvx2;
  if (!bit(a71, 5) || !runs(try_avx512_bf16)) return kAvx512;
  const bool has_amx = bit(d7, 22) && bit(d7, 24) && bit(d7, 25);  // BF16, TILE, INT8
  if (!has_amx || !allowed_amx() || !runs(try_amx)) return kAvx512Bf16;
  return kAmx;
}

}  // namespace foveate
