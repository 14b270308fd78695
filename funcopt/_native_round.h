/* Other ways to round to 16 bits than to the nearest: by chance, and with what was lost kept.
 *
 * By chance, a number becomes one of its two neighbours, the nearer one the more often, so that the
 * mean is the number itself. The bits for that are those of Philox 4x32-10 (Salmon et al., "Parallel
 * random numbers: as easy as 1, 2, 3", SC 2011), a function of a key and of a counter: of which
 * element of which column of which leaf at which update. So they are the same however leaves are
 * spread over memory and threads. `_engine/rounding.py` says the same in operators of torch.
 *
 * A call gives four words of 32 bits, for eight elements of BLOCK / 8 apart: BLOCK / 8 calls serve a
 * block, and each word of theirs elements that lie side by side.
 */

enum { CALLS = BLOCK / 8, WORDS = BLOCK / 2 };
enum { ROUNDS = 10 };
static const uint64_t LEFT = 0xD2511F53, RIGHT = 0xCD9E8D57, WORD = 0xFFFFFFFF;

/* The key of each round, for a member. */
typedef struct {
    uint64_t low[ROUNDS], high[ROUNDS];
} Keys;

INLINE void set_keys(const Job *job, int64_t member, Keys *keys)
{
    const uint64_t key = job->keys[2 * member];
    for (uint64_t round = 0; round < ROUNDS; round++) {
        keys->low[round] = (key + round * 0x9E3779B9) & WORD;
        keys->high[round] = ((key >> 32) + round * 0xBB67AE85) & WORD;
    }
}

/* What all calls for a block of a column have in common. Their counters differ in one word of four,
 * so that a half of the first two rounds is done here: these are parts of the words after them. */
typedef struct {
    uint64_t first_call, third, first, third_again, fourth;
} Start;

INLINE void set_start(const Job *job, const Keys *keys, int64_t member, int64_t leaf, int column,
                      int64_t block, Start *start)
{
    const uint64_t step = job->keys[2 * member + 1], call = (uint64_t)block * CALLS;
    const uint64_t second = ((uint64_t)column | (uint64_t)job->ids[leaf] << 3) & WORD;
    const uint64_t fourth = (call >> 32 & 0xFFFF) | (step >> 32 << 16 & WORD);
    const uint64_t right = (step & WORD) * RIGHT;
    const uint64_t left = ((right >> 32) ^ second ^ keys->low[0]) * LEFT;
    start->first_call = call & WORD;
    start->third = fourth ^ keys->high[0];
    start->first = (right & WORD) ^ keys->low[1];
    start->third_again = (left >> 32) ^ keys->high[1];
    start->fourth = left & WORD;
}

/* What is finite stays finite: past the largest number there is no neighbour to round to. */
INLINE uint16_t to_bfloat16_by(float value, uint16_t random)
{
    const uint32_t bits = bits_of(value), rest = bits & 0x7FFFFFFF;
    uint32_t rounded = (rest + random) >> 16;
    rounded = rounded < 0x7F7F ? rounded : 0x7F7F;
    rounded = rest < 0x7F800000 ? rounded : 0x7F80;
    rounded = rest <= 0x7F800000 ? rounded : 0x7FC0;
    return (uint16_t)((bits >> 16 & 0x8000) | rounded);
}

INLINE uint16_t to_float16_by(float value, uint16_t random)
{
    const uint32_t bits = bits_of(value), rest = bits & 0x7FFFFFFF;
    const uint32_t normal = (rest - (112u << 23) + (random >> 3)) >> 13;
    /* Below 2**-14, numbers are multiples of 2**-24. */
    const float multiple = from_bits(rest < 0x38800000 ? rest : 0) * 0x1p24f;
    const int32_t whole = (int32_t)multiple;
    const uint32_t subnormal = (uint32_t)whole + ((multiple - (float)whole) * 65536.0f > random);
    uint32_t rounded = rest < 0x38800000 ? subnormal : normal;
    rounded = rest < 0x47800000 && rounded < 0x7BFF ? rounded : 0x7BFF;
    rounded = rest < 0x7F800000 ? rounded : 0x7C00;
    rounded = rest <= 0x7F800000 ? rounded : 0x7E00;
    return (uint16_t)((bits >> 16 & 0x8000) | rounded);
}

INLINE void give_by_float(int dtype, const float *values, const uint16_t *random, char *target,
                          int64_t count)
{
    uint16_t *halves = (uint16_t *)target;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            halves[i] = to_bfloat16_by(values[i], random[i]);
    else
        for (int64_t i = 0; i < count; i++)
            halves[i] = to_float16_by(values[i], random[i]);
}

INLINE void give_by_double(int dtype, const double *values, const uint16_t *random, char *target,
                           int64_t count)
{
    (void)dtype, (void)values, (void)random, (void)target, (void)count;
}

/* Add to parameters what was lost when they were rounded. */
INLINE void compensate_float(float *params, const float *lost, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        params[i] += lost[i];
}

INLINE void compensate_double(double *params, const double *lost, int64_t count)
{
    (void)params, (void)lost, (void)count;
}

/* The bits of a float that is rounded to the nearest bfloat16. */
INLINE uint32_t in_bfloat16(float value)
{
    return (uint32_t)to_bfloat16(value) << 16;
}

/* Find what is lost when parameters are rounded to the nearest: of what is not finite, nothing.
 * Half a unit of a parameter becomes the next smaller number, which is one bit less, or the sum of
 * both would round to a neighbour. Of -0 nothing is lost, and the sum with that is 0. */
INLINE void find_lost_float(int dtype, const float *params, uint16_t *lost, int64_t count)
{
    uint32_t found[BLOCK];
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) {
            const uint32_t kept = in_bfloat16(params[i]);
            const uint32_t rest = in_bfloat16(params[i] - from_bits(kept));
            const uint32_t sum = in_bfloat16(from_bits(kept) + from_bits(rest));
            const uint32_t finite = (kept & 0x7FFFFFFF) < 0x7F800000 ? 0xFFFFFFFF : 0;
            found[i] = ((rest >> 16) - ((sum != kept) & (rest != 0))) & finite;
        }
    else
        for (int64_t i = 0; i < count; i++) {
            const uint32_t kept = bits_of(from_float16(to_float16(params[i])));
            const uint32_t rest = to_float16(params[i] - from_bits(kept));
            const float sum = from_bits(kept) + from_float16((uint16_t)rest);
            const uint32_t again = bits_of(from_float16(to_float16(sum)));
            const uint32_t finite = (kept & 0x7FFFFFFF) < 0x7F800000 ? 0xFFFFFFFF : 0;
            found[i] = (rest - ((again != kept) & (rest != 0))) & finite;
        }
    for (int64_t i = 0; i < count; i++)
        lost[i] = (uint16_t)found[i];
}

INLINE void find_lost_double(int dtype, const double *params, uint16_t *lost, int64_t count)
{
    (void)dtype, (void)params, (void)lost, (void)count;
}
