/* Products of matrices by an instruction for pairs of bfloat16, of AVX-512.
 *
 * Two elements that meet others in one product lie side by side in a panel. A tile is summed up in
 * registers, by one instruction for each pair of elements and each row. */

static int has_bfloat16_tiles(void)
{
    return has_avx512() && (features(1, 0) >> 5 & 1) != 0;
}

/* Return whether there are no matrix registers, by which torch makes products faster than these. */
static int lacks_matrix_registers(void)
{
    return (features(0, 3) >> 22 & 1) == 0;
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif

/* Turn rows of 16 numbers of 32 bits into columns. */
INLINE void transpose(__m512i *rows)
{
    __m512i pairs[TILE], fours[TILE];
    UNROLL_TILE
    for (int i = 0; i < TILE; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL_TILE
    for (int i = 0; i < TILE; i += 4)
        UNROLL_TILE
        for (int half = 0; half < 2; half++) {
            fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
            fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
        }
    UNROLL_TILE
    for (int i = 0; i < 4; i++) {
        const __m512i even = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xDD);
        const __m512i more_even = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88);
        const __m512i more_odd = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xDD);
        rows[i] = _mm512_shuffle_i32x4(even, more_even, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(even, more_even, 0xDD);
        rows[i + 4] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(odd, more_odd, 0xDD);
    }
}

/* Copy so many elements of so many rows, in which they lie one after another, into a panel. */
INLINE void pack_block(const uint16_t *source, int64_t step, int64_t rows, int64_t count,
                       uint32_t *target)
{
    const __mmask32 mask = (__mmask32)(((uint64_t)1 << count) - 1);
    __m512i words[TILE];
    UNROLL_TILE
    for (int i = 0; i < TILE; i++)
        words[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, source + i * step)
                            : _mm512_setzero_si512();
    transpose(words);
    UNROLL_TILE
    for (int pair = 0; pair < TILE; pair++)
        if (2 * pair < count)
            _mm512_store_si512(target + pair * TILE, words[pair]);
}

static void pack_lengthwise(const uint16_t *source, int64_t rows, int64_t depth, uint32_t *panel)
{
    int64_t k = 0;
    if (rows == TILE)
        for (; k + 2 * TILE <= depth; k += 2 * TILE)
            pack_block(source + k, depth, TILE, 2 * TILE, panel + k / 2 * TILE);
    for (; k < depth; k += 2 * TILE)
        pack_block(source + k, depth, rows, least(depth - k, 2 * TILE), panel + k / 2 * TILE);
}

/* Copy rows of which the elements lie `step` apart, and one beside the next row's, into panels of a
 * size, all together: elements side by side are read while they are in the cache. */
static void pack_crosswise(const uint16_t *source, int64_t step, int64_t rows, int64_t depth,
                           uint32_t *panels, int64_t size)
{
    for (int64_t k = 0; k < depth; k += 2)
        for (int64_t row = 0; row < rows; row += TILE) {
            const __mmask16 mask = (__mmask16)((1u << least(rows - row, TILE)) - 1);
            const uint16_t *one = source + k * step + row;
            const __m256i first = _mm256_maskz_loadu_epi16(mask, one);
            const __m256i second = k + 1 < depth ? _mm256_maskz_loadu_epi16(mask, one + step)
                                                 : _mm256_setzero_si256();
            const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
            _mm512_store_si512(panels + row / TILE * size + k / 2 * TILE,
                               _mm512_or_si512(_mm512_cvtepu16_epi32(first), upper));
        }
}

static void pack_pairs(const Product *product, const Factor *factor, int64_t matrix, int64_t first)
{
    const int64_t depth = product->depth, size = panel_size(product);
    const int64_t last = least(first + PACKED * TILE, factor->rows);
    const uint16_t *source = factor->source + matrix * factor->rows * depth;
    uint32_t *panels = factor->panels + matrix * size_of_panels(product, factor);
    if (factor->is_crosswise)
        pack_crosswise(source + first, factor->rows, last - first, depth,
                       panels + first / TILE * size, size);
    else
        for (int64_t row = first; row < last; row += TILE)
            pack_lengthwise(source + row * depth, least(last - row, TILE), depth,
                            panels + row / TILE * size);
}

/* Sum up a tile. The registers are named by constants once the loops of 16 are unrolled. */
INLINE void sum_up(const uint32_t *left, const uint32_t *right, int64_t pairs, __m512 *sums)
{
    __m512 own[TILE];
    UNROLL_TILE
    for (int i = 0; i < TILE; i++)
        own[i] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++) {
        const __m512bh columns = (__m512bh)_mm512_load_si512(right + pair * TILE);
        UNROLL_TILE
        for (int i = 0; i < TILE; i++) {
            const __m512i row = _mm512_set1_epi32((int)left[pair * TILE + i]);
            own[i] = _mm512_dpbf16_ps(own[i], (__m512bh)row, columns);
        }
    }
    UNROLL_TILE
    for (int i = 0; i < TILE; i++)
        sums[i] = own[i];
}

/* Write a tile, rounded, at its place in matrices of so many columns. */
INLINE void write_tile(const __m512 *tile, uint16_t *target, int64_t stride, int64_t rows,
                       int64_t columns)
{
    const __mmask16 mask = (__mmask16)((1u << columns) - 1);
    for (int64_t i = 0; i < rows; i++)
        _mm256_mask_storeu_epi16(target + i * stride, mask, (__m256i)_mm512_cvtneps_pbh(tile[i]));
}

/* Make the tile of one panel of the left factor and one of the right one. */
static void make_tile(const Product *product, int64_t matrix, int64_t down, int64_t across)
{
    const Factor *left = &product->left, *right = &product->right;
    const int64_t stride = right->rows, size = panel_size(product);
    const int64_t rows = least(left->rows - down * TILE, TILE);
    const int64_t columns = least(right->rows - across * TILE, TILE);
    const int64_t start = matrix * left->rows * stride;
    const int64_t at = start + (down * stride + across) * TILE;
    const __mmask16 mask = (__mmask16)((1u << columns) - 1);
    __m512 tile[TILE];
    sum_up(left->panels + matrix * size_of_panels(product, left) + down * size,
           right->panels + matrix * size_of_panels(product, right) + across * size,
           size / TILE, tile);
    for (int64_t i = 0; i < rows; i++) {
        tile[i] = _mm512_mul_ps(tile[i], _mm512_set1_ps(product->alpha));
        for (int other = 0; other < product->addends; other++) {
            const uint16_t *from = product->addend[other] + at + i * stride;
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
            const __m512 own = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            tile[i] = _mm512_fmadd_ps(own, _mm512_set1_ps(product->factor[other]), tile[i]);
        }
    }
    if (!product->is_symmetric) {
        write_tile(tile, product->result + at, stride, rows, columns);
        return;
    }
    __m512i mirrored[TILE];
    for (int i = 0; i < TILE; i++)
        mirrored[i] = _mm512_castps_si512(tile[i]);
    transpose(mirrored);
    for (int i = 0; i < TILE; i++) /* on the diagonal, what is above it is copied from below */
        if (down == across)
            tile[i] = _mm512_mask_blend_ps((__mmask16)(0xFFFEu << i), tile[i],
                                           _mm512_castsi512_ps(mirrored[i]));
    write_tile(tile, product->result + at, stride, rows, columns);
    if (down == across)
        return;
    for (int i = 0; i < TILE; i++)
        tile[i] = _mm512_castsi512_ps(mirrored[i]);
    write_tile(tile, product->result + start + (across * stride + down) * TILE, stride, columns,
               rows);
}

static void make_piece_of_pairs(const Product *product, int64_t matrix, int64_t top, int64_t first)
{
    const int64_t bottom = least(top + TALL, over(product->left.rows, TILE));
    const int64_t last = least(first + WIDE, over(product->right.rows, TILE));
    for (int64_t across = first; across < last; across++)
        for (int64_t down = top; down < bottom; down++)
            if (is_made(product, down, across))
                make_tile(product, matrix, down, across);
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
