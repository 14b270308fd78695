/* How a column is on its way to the registers and back: as it is, or in bfloat16, rounded to the
 * nearest or by chance. Included by `_native_steps.h`, with what is defined there. */

#if HAS_SHORTS
typedef uint64_t NAME(Words) __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
#else
typedef uint64_t NAME(Words);
#define PRODUCT(words, number) (((words) & WORD) * (number))
#endif

/* Find the four words of 32 bits of each of some calls, which have 64. Nobody reads the upper half,
 * so nobody clears it. */
INLINE void NAME(find_words)(const Keys *keys, const Start *start, NAME(Words) call,
                             NAME(Words) *words)
{
    NAME(Words) left = (NAME(Words))PRODUCT(call, LEFT);
    NAME(Words) third = (left >> 32) ^ start->third;
    NAME(Words) right = (NAME(Words))PRODUCT(third, RIGHT);
    NAME(Words) first = (right >> 32) ^ start->first, second = right;
    NAME(Words) fourth = (left ^ left) + start->fourth;
    third = left ^ start->third_again;
    for (int round = 2; round < ROUNDS; round++) {
        left = (NAME(Words))PRODUCT(first, LEFT);
        right = (NAME(Words))PRODUCT(third, RIGHT);
        first = (right >> 32) ^ second ^ keys->low[round];
        third = (left >> 32) ^ fourth ^ keys->high[round];
        second = right;
        fourth = left;
    }
    words[0] = first;
    words[1] = second;
    words[2] = third;
    words[3] = fourth;
}

/* Fill the words of some of the calls of a block. An element has the lower half of a word in the
 * first half of its block, the upper half in the other. */
INLINE void NAME(fill_words)(const Keys *keys, const Start *start, int begin, int end,
                             uint32_t *filled)
{
#if HAS_SHORTS
    static const uint64_t lanes[] = {0, 2, 4, 6, 8, 10, 12, 14};
    NAME(Words) even, ones[4], others[4];
    memcpy(&even, lanes, sizeof(even));
    even += start->first_call;
    for (int i = begin; i < end; i += WIDTH) {
        NAME(find_words)(keys, start, even + (uint64_t)i, ones);
        NAME(find_words)(keys, start, even + (uint64_t)i + 1, others);
        for (int word = 0; word < 4; word++) {
            const NAME(Words) both = (ones[word] & WORD) | others[word] << 32;
            memcpy(filled + word * CALLS + i, &both, sizeof(both));
        }
    }
#else
    for (int i = begin; i < end; i++) {
        uint64_t words[4];
        NAME(find_words)(keys, start, start->first_call + (uint64_t)i, words);
        for (int word = 0; word < 4; word++)
            filled[word * CALLS + i] = (uint32_t)words[word];
    }
#endif
}

#if HAS_SHORTS
/* A bfloat16 is the upper half of a float: here it stays there, with anything in the lower half. */
#if WIDTH == 16
typedef uint16_t Halves __attribute__((vector_size(64)));
static const Halves to_upper_halves = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                       0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
static const Halves upper_halves = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
#endif

INLINE VECTOR NAME(widened)(const uint16_t *source)
{
    return (VECTOR)WIDEN(source);
}

INLINE void NAME(put_short)(uint16_t *target, NAME(Bits) bits)
{
    const NAME(Shorts) shorts = (NAME(Shorts))UPPER(bits);
    memcpy(target, &shorts, sizeof(shorts));
}

/* Return the bits of the nearest bfloat16 of what is not NaN. */
INLINE NAME(Bits) NAME(nearest_number)(VECTOR vector)
{
    const NAME(Bits) bits = (NAME(Bits))vector;
    return bits + 0x7FFF + (bits >> 16 & 1);
}

/* Return the bits of the nearest bfloat16, as `to_bfloat16` does. */
INLINE NAME(Bits) NAME(nearest)(VECTOR vector)
{
    const NAME(Bits) is_nan = (NAME(Bits))(vector != vector);
    return (is_nan & 0x7FC00000) | (~is_nan & NAME(nearest_number)(vector));
}

/* Return the bits of the bfloat16 that random bits choose, as `to_bfloat16_by` does: those in the
 * upper halves of the words if `shift` is 16, else those in the lower ones. */
INLINE NAME(Bits) NAME(by_chance)(VECTOR vector, const uint32_t *words, int shift)
{
    NAME(Bits) random;
    memcpy(&random, words, sizeof(random));
    random = random >> shift & 0xFFFF;
    const NAME(Bits) bits = (NAME(Bits))vector, is_nan = (NAME(Bits))(vector != vector);
    const NAME(Bits) rest = bits & 0x7FFFFFFF, largest = (bits ^ bits) + 0x7F7FFFFF;
    const NAME(Bits) finite = (NAME(Bits))WHOLE(min, rest + random, largest);
    const NAME(Bits) size = (NAME(Bits))WHOLE(max, finite, rest); /* the rest, if infinite */
    return (bits & 0x80000000) | (is_nan & 0x7FC00000) | (~is_nan & size);
}

/* Return the bits of what is lost of a parameter of which `kept` is kept, as `find_lost` does.
 *
 * Their sum rounds to another neighbour only if it lies half-way and what is kept is odd. */
INLINE NAME(Bits) NAME(lost_of)(VECTOR param, NAME(Bits) kept)
{
    const VECTOR own = (VECTOR)(kept & 0xFFFF0000);
    const NAME(Bits) rest = NAME(nearest_number)(param - own);
    const NAME(Bits) sum = (NAME(Bits))(own + (VECTOR)(rest & 0xFFFF0000));
    const NAME(Bits) low = (kept & 0x10000) | (sum & 0xFFFF);
    const NAME(Bits) is_half = (NAME(Bits))(low == 0x18000);
    const NAME(Bits) is_finite = (NAME(Bits))((kept & 0x7FFFFFFF) < 0x7F800000);
    return (rest + (is_half & 0xFFFF0000)) & is_finite;
}
#endif

/* Write a vector, past the cache if `streamed`. */
INLINE void NAME(put)(REAL *target, VECTOR vector, int streamed)
{
    if (streamed)
        STREAM(target, vector);
    else
        STORE(target, vector);
}

INLINE VECTOR NAME(take_at)(const REAL *source, int64_t i, int shorts)
{
#if HAS_SHORTS
    if (shorts)
        return NAME(widened)((const uint16_t *)source + i);
#endif
    (void)shorts;
    return LOAD(source + i);
}

/* `shorts` is 0, or says how to round: by chance with `words` and `shift`, or to the nearest. */
INLINE void NAME(give_at)(REAL *target, int64_t i, VECTOR vector, int streamed, int shorts,
                          const uint32_t *words, int shift)
{
#if HAS_SHORTS
    if (shorts & BY_CHANCE) {
        NAME(put_short)((uint16_t *)target + i, NAME(by_chance)(vector, words + i, shift));
        return;
    }
    if (shorts) {
        NAME(put_short)((uint16_t *)target + i, NAME(nearest)(vector));
        return;
    }
#endif
    (void)shorts, (void)words, (void)shift;
    NAME(put)(target + i, vector, streamed);
}
