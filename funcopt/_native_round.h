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

enum { CALLS = BLOCK / 8 };

/* Fill the random bits of a block, which is the `block`th of BLOCK elements of a leaf. */
INLINE void fill_random(uint16_t *bits, const uint64_t *key_and_step, int64_t leaf, int column,
                        int64_t block)
{
    const uint64_t key = key_and_step[0], step = key_and_step[1];
    const uint64_t first_call = (uint64_t)block * CALLS;
    uint32_t one[CALLS], two[CALLS], three[CALLS], four[CALLS];
    for (int i = 0; i < CALLS; i++) {
        const uint64_t call = first_call + (uint64_t)i;
        one[i] = (uint32_t)call;
        two[i] = (uint32_t)column | (uint32_t)leaf << 3;
        three[i] = (uint32_t)step;
        four[i] = (uint32_t)(call >> 32 & 0xFFFF) | (uint32_t)(step >> 32) << 16;
    }
    uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < CALLS; i++) {
            const uint64_t left = (uint64_t)one[i] * 0xD2511F53u;
            const uint64_t right = (uint64_t)three[i] * 0xCD9E8D57u;
            one[i] = (uint32_t)(right >> 32) ^ two[i] ^ low;
            three[i] = (uint32_t)(left >> 32) ^ four[i] ^ high;
            two[i] = (uint32_t)right;
            four[i] = (uint32_t)left;
        }
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    for (int i = 0; i < CALLS; i++) {
        bits[i] = (uint16_t)one[i];
        bits[CALLS + i] = (uint16_t)two[i];
        bits[2 * CALLS + i] = (uint16_t)three[i];
        bits[3 * CALLS + i] = (uint16_t)four[i];
        bits[4 * CALLS + i] = (uint16_t)(one[i] >> 16);
        bits[5 * CALLS + i] = (uint16_t)(two[i] >> 16);
        bits[6 * CALLS + i] = (uint16_t)(three[i] >> 16);
        bits[7 * CALLS + i] = (uint16_t)(four[i] >> 16);
    }
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

/* Find what is lost when parameters are rounded to the nearest: of what is not finite, nothing. */
INLINE void find_lost_float(int dtype, const float *params, float *lost, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const float kept = dtype == BFLOAT16 ? from_bfloat16(to_bfloat16(params[i]))
                                             : from_float16(to_float16(params[i]));
        const int is_finite = (bits_of(kept) & 0x7FFFFFFF) < 0x7F800000;
        lost[i] = is_finite ? params[i] - kept : 0.0f;
    }
}

INLINE void find_lost_double(int dtype, const double *params, double *lost, int64_t count)
{
    (void)dtype, (void)params, (void)lost, (void)count;
}
