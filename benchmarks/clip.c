/* Clipping by the global norm, as close to the memory's limit as plain C comes: read, then read, scale and write
   in place. Chunks are of one leaf each and small enough that float32 sums in 64 lanes lose nothing; sums of
   chunks are added in float64. Entries are finite. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 64

static inline float widened(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint16_t rounded(float x) { /* to the nearest bfloat16, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float same(float x) { return x; }

#define CLIP(NAME, TYPE, READ, WRITE)                                                                         \
  static double NAME##_squares(const TYPE *x, int64_t size) {                                                 \
    float lanes[LANES] = {0};                                                                                 \
    int64_t k = 0;                                                                                            \
    double total = 0;                                                                                         \
    for (; k + LANES <= size; k += LANES)                                                                     \
      for (int j = 0; j < LANES; j++) {                                                                       \
        float value = READ(x[k + j]);                                                                         \
        lanes[j] += value * value;                                                                            \
      }                                                                                                       \
    for (; k < size; k++) lanes[k % LANES] += READ(x[k]) * READ(x[k]);                                        \
    for (int j = 0; j < LANES; j++) total += lanes[j];                                                        \
    return total;                                                                                             \
  }                                                                                                           \
                                                                                                              \
  double NAME(TYPE **chunks, const int64_t *sizes, int64_t count, double limit, int threads) {                \
    double total = 0;                                                                                         \
    _Pragma("omp parallel for schedule(dynamic, 4) reduction(+ : total) num_threads(threads)")                    \
    for (int64_t i = 0; i < count; i++) total += NAME##_squares(chunks[i], sizes[i]);                         \
    double norm = sqrt(total);                                                                                \
    float factor = norm > limit ? (float)(limit / norm) : 1.0f;                                               \
    _Pragma("omp parallel for schedule(dynamic, 4) num_threads(threads)")                                         \
    for (int64_t i = 0; i < count; i++) {                                                                     \
      TYPE *x = chunks[i];                                                                                    \
      for (int64_t k = 0; k < sizes[i]; k++) x[k] = WRITE(READ(x[k]) * factor);                               \
    }                                                                                                         \
    return norm;                                                                                              \
  }

CLIP(clip_float32, float, same, same)
CLIP(clip_bfloat16, uint16_t, widened, rounded)
