/* Calls the native kernels on tensors made of the fuzzer's bytes, and compares with plain loops in long double.
 *
 * Built with libFuzzer it is a fuzz target; with -DMAIN it feeds itself the given number of random inputs. Buffers are as
 * long as their tensors, so that the address sanitizer sees every step too far.
 */

#include "../../src/gradkeel/kernels/native.c"

#include <math.h>
#include <pthread.h>
#include <stdio.h>

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                                   \
            abort();                                                                                                  \
        }                                                                                                             \
    } while (0)

/* ---- input ------------------------------------------------------------------------------------------------------ */

static const uint8_t *input, *input_end;

static unsigned take(unsigned below) {
    if (below == 0 || input + 2 > input_end) return 0;
    unsigned value = input[0] | (unsigned)input[1] << 8;
    input += 2;
    return value % below;
}

/* ---- torch's side: a list of described tensors --------------------------------------------------------------------- */

#define MOST 6

struct fake {
    struct dltensor described;
    int64_t shape[4], strides[4];
    int is_dense;
};

static struct fake tensors[MOST];

static void *item_of(void *list, intptr_t index) { return (struct fake *)list + index; }

static int export_fake(void *object, struct dltensor *out) {
    *out = ((struct fake *)object)->described;
    return 0;
}

static const uint8_t CODES[4] = {DL_FLOAT, DL_BFLOAT, DL_FLOAT, DL_FLOAT}, BITS[4] = {32, 16, 16, 64};

static void fill(char *data, int64_t size, int width) {
    unsigned how = take(4);
    uint64_t state = take(65536);
    for (int64_t i = 0; i < size; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint8_t bits = (uint8_t)(state >> 56);
        /* any bits, with NaN and inf, denormals and all; or the last byte, which holds the exponent, of ordinary ones */
        if (how > 0 && i % width == width - 1) bits = (bits & 0x80) | (how == 3 ? 0x00 : 0x3b + bits % how);
        data[i] = (char)bits;
    }
}

static int64_t count_of(const struct fake *t, unsigned dims) {
    int64_t count = 1;
    for (unsigned d = 0; d < dims; d++) count *= t->shape[d];
    return count;
}

/* A tensor of up to four dimensions, dense in a random order of them, or with gaps or overlaps. */
static void make(struct fake *t) {
    unsigned kind = take(4), dims = take(5);
    int order[4] = {0, 1, 2, 3};
    int64_t count = 1;
    t->described = (struct dltensor){.device_type = DL_CPU, .ndim = (int32_t)dims, .code = CODES[kind],
                                     .bits = BITS[kind], .lanes = 1, .shape = t->shape, .strides = t->strides};
    for (unsigned d = 0; d < dims; d++) {
        static const int64_t lengths[] = {0, 1, 2, 3, 7, 31, 64, 200};
        t->shape[d] = lengths[take(d == 0 ? 8 : 6)];
        if (take(12) == 1 && dims <= 2 && count_of(t, d) < 64) t->shape[d] *= 4000; /* longer than a run */
    }
    for (unsigned d = dims; d > 1; d--) {
        unsigned other = take(d);
        int swapped = order[d - 1];
        order[d - 1] = order[other];
        order[other] = swapped;
    }
    for (int d = (int)dims - 1; d >= 0; d--) {
        t->strides[order[d]] = count;
        count *= t->shape[order[d]];
    }
    t->is_dense = count == 0 || dims == 0 || take(8) > 0;
    if (!t->is_dense) {
        unsigned d = take(dims);
        t->is_dense = t->shape[d] == 1;
        t->strides[d] = take(2) ? t->strides[d] * 2 : 0;
        count *= 2;
    }
    int64_t size = count * BITS[kind] / 8;
    t->described.byte_offset = take(3) * 8;
    t->described.data = malloc((size_t)size + t->described.byte_offset);
    fill((char *)t->described.data + t->described.byte_offset, size, BITS[kind] / 8);
}

/* ---- plain loops --------------------------------------------------------------------------------------------------- */

static long double value(const struct tensor *t, const void *data, int64_t i) {
    if (t->kind == FLOAT64) return ((const double *)data)[i];
    if (t->kind == FLOAT32) return ((const float *)data)[i];
    uint16_t bits = ((const uint16_t *)data)[i];
    int exponent_bits = t->kind == FLOAT16 ? 5 : 8, digits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = bits >> digits & ((1 << exponent_bits) - 1), fraction = bits & ((1 << digits) - 1);
    long double magnitude;
    if (exponent == (1 << exponent_bits) - 1)
        magnitude = fraction ? NAN : INFINITY;
    else
        magnitude = ldexpl(exponent ? fraction + (1 << digits) : fraction, (exponent ? exponent : 1) - bias - digits);
    return bits & 0x8000 ? -magnitude : magnitude;
}

static long double plain_norm(const struct tensor *t, const char *data, int64_t from, int64_t count, int norm) {
    long double sum = 0;
    for (int64_t i = from; i < from + count; i++) {
        long double x = fabsl(value(t, data, i));
        sum = norm == LARGEST ? (isnan(x) || x > sum ? x : sum) : sum + (norm == SQUARES ? x * x : x);
        if (isnan(sum)) return NAN;
    }
    return norm == SQUARES ? sqrtl(sum) : sum;
}

static int same(int64_t kind, double got, long double wanted) {
    if (isnan(wanted)) return isnan(got);
    /* up to 1e5 float64 additions in another order, or, in 16 bits, up to 1,024 in float32; and long double reaches
     * beyond float64 at both ends */
    long double share = kind == FLOAT16 || kind == BFLOAT16 ? 1024 * 6e-8L : 1e-11L;
    return (double)wanted == got || fabsl(got - wanted) <= share * fabsl(wanted) + 1e-300L;
}

/* Whether `got` is `wanted` rounded to the tensor's type: no other number of the type is nearer. */
static int is_rounded(const struct tensor *t, const void *data, int64_t i, double wanted) {
    long double got = value(t, data, i);
    if (isnan(wanted)) return isnan(got);
    if (t->kind >= FLOAT64) return got == wanted;
    if (t->kind == FLOAT32) return (float)wanted == got;
    static const struct tensor dummy;
    struct tensor like = dummy;
    like.kind = t->kind;
    uint16_t bits = ((const uint16_t *)data)[i];
    int largest = t->kind == FLOAT16 ? 0x7c00 : 0x7f80;
    /* the gap to infinity counts as that to a next finite number */
    long double top = ldexpl(1, t->kind == FLOAT16 ? 16 : 128), here = isinf(got) ? copysignl(top, got) : got;
    if (isinf(wanted)) return got == wanted;
    for (int step = -1; step <= 1; step += 2) {
        int next = (bits & 0x7fff) + step;
        if (next < 0 || next > largest) continue;
        uint16_t neighbour = (uint16_t)(next | (bits & 0x8000));
        long double other = value(&like, &neighbour, 0);
        if (isinf(other)) other = copysignl(top, other);
        long double far = fabsl(other - wanted), near = fabsl(here - wanted);
        if (far < near || (far == near && (bits & 1))) return 0;
    }
    return 1;
}

/* ---- the fuzz target ------------------------------------------------------------------------------------------------ */

struct call {
    void (*function)(void *);
    void *argument;
};

static void *in_thread(void *call) {
    ((struct call *)call)->function(((struct call *)call)->argument);
    return NULL;
}

static void parallel(void (*function)(void *), void *argument, unsigned threads, unsigned flags) {
    struct call call = {function, argument};
    pthread_t others[8];
    (void)flags;
    for (unsigned i = 1; i < threads; i++) CHECK(pthread_create(others + i, NULL, in_thread, &call) == 0);
    function(argument);
    for (unsigned i = 1; i < threads; i++) pthread_join(others[i], NULL);
}

static char *copy_of(const struct tensor *t) {
    size_t size = (size_t)t->entries * width((int)t->kind);
    char *copy = malloc(size ? size : 1);
    memcpy(copy, t->data, size);
    return copy;
}

static void check_reading(const struct tensor *table, int64_t count, int64_t rows, int by_row, const struct team *team) {
    int norm = (int)take(3);
    double *norms = malloc((size_t)count * sizeof *norms + 1), *peaks = malloc((size_t)count * 2 * sizeof *peaks + 1);
    double *units = malloc((size_t)rows * sizeof *units + 1), *unit = units;
    int with_peaks = (int)take(2);
    CHECK(gradkeel_read(table, count, norm, norms, by_row ? units : NULL, with_peaks ? peaks : NULL, NULL, team) == 0);
    for (int64_t i = 0; i < count; i++) {
        const struct tensor *t = table + i;
        long double low = INFINITY, high = -INFINITY;
        int is_nan = 0;
        CHECK(same(t->kind, norms[i], plain_norm(t, t->data, 0, t->entries, norm)));
        for (int64_t j = 0; j < t->rows && by_row; j++) {
            int64_t size = t->entries / t->rows;
            CHECK(same(t->kind, *unit++, plain_norm(t, t->data, j * size, size, norm)));
        }
        for (int64_t j = 0; j < t->entries; j++) {
            long double x = value(t, t->data, j);
            is_nan |= isnan(x);
            low = x < low ? x : low;
            high = x > high ? x : high;
        }
        if (!with_peaks) continue;
        if (t->entries == 0) low = high = 0;
        CHECK(is_nan ? isnan(peaks[2 * i]) && isnan(peaks[2 * i + 1]) : peaks[2 * i] == low && peaks[2 * i + 1] == high);
    }
    free(norms);
    free(peaks);
    free(units);
}

static void check_writing(const struct tensor *table, int64_t count, int64_t rows, int by_row, const struct team *team) {
    static const double choices[] = {1.0, 1.5, 0.1234567890123, 3e-30, 1.0, 7e20, 0.75};
    double *factors = malloc((size_t)(by_row ? rows : count) * sizeof *factors + 1), low = -0.75, high = 0.3;
    for (int64_t i = 0; i < (by_row ? rows : count); i++) factors[i] = choices[take(7)];
    char *before[MOST];
    for (int64_t i = 0; i < count; i++) before[i] = copy_of(table + i);
    int clamps = (int)take(2);
    CHECK((clamps ? gradkeel_clamp(table, count, low, high, team)
                  : gradkeel_scale(table, count, factors, by_row, team)) == 0);
    for (int64_t i = 0, row = 0; i < count; row += table[i++].rows) {
        const struct tensor *t = table + i;
        for (int64_t j = 0; j < t->entries; j++) {
            double factor = factors[by_row ? row + j / (t->entries / t->rows) : i], x = (double)value(t, before[i], j);
            if (clamps) {
                x = t->kind == FLOAT64 ? (x < low ? low : x > high ? high : x)
                                       : (x < (float)low ? (float)low : x > (float)high ? (float)high : x);
            } else if (factor == 1.0) {
                CHECK(memcmp((char *)t->data + (size_t)j * width((int)t->kind),
                             before[i] + (size_t)j * width((int)t->kind), width((int)t->kind)) == 0);
                continue;
            } else {
                x = t->kind == FLOAT64 ? x * factor : (float)x * (float)factor;
            }
            CHECK(is_rounded(t, t->data, j, x));
        }
        free(before[i]);
    }
    free(factors);
}

static void check_adding(struct tensor *table, int64_t count, const struct team *team) {
    struct tensor sums[MOST];
    long double *wanted[MOST];
    int64_t kind = take(2) ? FLOAT64 : FLOAT32;
    for (int64_t i = 0; i < count; i++) {
        if (kind == FLOAT32 && table[i].kind == FLOAT64) table[i].entries = 0; /* a sum is never narrower */
        sums[i] = (struct tensor){malloc((size_t)table[i].entries * width((int)kind) + 1), table[i].entries, 1, kind};
        wanted[i] = malloc((size_t)table[i].entries * sizeof **wanted + 1);
        fill(sums[i].data, table[i].entries * (int64_t)width((int)kind), (int64_t)width((int)kind));
        for (int64_t j = 0; j < table[i].entries; j++) {
            long double x = value(sums + i, sums[i].data, j), y = value(table + i, table[i].data, j);
            wanted[i][j] = kind == FLOAT64 ? (double)x + (double)y : (float)x + (float)y;
        }
    }
    CHECK(gradkeel_add(sums, table, count, team) == 0);
    for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < sums[i].entries; j++) CHECK(is_rounded(sums + i, sums[i].data, j, wanted[i][j]));
        free(sums[i].data);
        free(wanted[i]);
    }
}

/* Copies are the same bytes, and distances from them are those of entries that have changed since. */
static void check_copying(struct tensor *table, int64_t count, const struct team *team) {
    struct tensor copies[MOST];
    double norms[MOST];
    size_t size = 1;
    for (int64_t i = 0; i < count; i++) size += (size_t)table[i].entries * width((int)table[i].kind) + 63;
    char *memory = malloc(size);
    CHECK(gradkeel_copy(table, count, copies, memory, team) == 0);
    for (int64_t i = 0; i < count; i++) {
        int kind = (int)table[i].kind;
        size_t bytes = (size_t)table[i].entries * width(kind);
        CHECK(memcmp(copies[i].data, table[i].data, bytes) == 0);
        if (take(2)) fill(table[i].data, (int64_t)bytes, (int)width(kind));
    }
    if (count > 0 && take(4) == 1) {
        copies[count - 1].entries++;
        CHECK(gradkeel_read(table, count, SQUARES, norms, NULL, NULL, copies, team) == 1);
        copies[count - 1].entries--;
    }
    CHECK(gradkeel_read(table, count, SQUARES, norms, NULL, NULL, copies, team) == 0);
    for (int64_t i = 0; i < count; i++) {
        const struct tensor *t = table + i;
        long double sum = 0;
        for (int64_t j = 0; j < t->entries; j++) {
            double x = (double)value(t, t->data, j) - (double)value(t, copies[i].data, j);
            sum += (long double)x * x;
        }
        CHECK(same(FLOAT64, norms[i], sqrtl(sum)));
    }
    free(memory);
}

/* ---- formulas ------------------------------------------------------------------------------------------------------- */

#define ARITHMETIC 22 /* the first codes, which are neither functions nor of windows */

static double any_number(void) {
    static const double numbers[] = {0, 1, -1, 0.5, 2, 7, 1e300, -1e-300, 3.25, INFINITY, -INFINITY, NAN};
    return take(3) ? (double)take(1000) / 64 : numbers[take(12)];
}

static double plain_result(int32_t code, double a, double b, double c) {
    switch ((enum code)code) {
    case PLUS: return a + b;
    case MINUS: return a - b;
    case TIMES: return a * b;
    case OVER: return a / b;
    case BOTH: return a && b;
    case EITHER: return a || b;
    case LESS: return a < b;
    case AT_MOST: return a <= b;
    case MORE: return a > b;
    case AT_LEAST: return a >= b;
    case EQUAL: return a == b;
    case UNEQUAL: return a != b;
    case NEGATIVE: return -a;
    case MAGNITUDE: return fabs(a);
    case NOT: return !a;
    case CHOSEN: return a ? b : c;
    case MAXIMUM: return isnan(a) || isnan(b) ? NAN : fmax(a, b);
    case MINIMUM: return isnan(a) || isnan(b) ? NAN : fmin(a, b);
    case IS_NORM: return isfinite(a) && a > 0;
    case IS_NUMBER: return isfinite(a);
    case AS_REAL: return a;
    case ROOT: return sqrt(a);
    case LOG: return log(a);
    case EXP: return exp(a);
    default: return expm1(a);
    }
}

static int alike(double one, double other) { return one == other || (isnan(one) && isnan(other)); }

/* Random operations on random cells give, bit for bit, what they give one after the other. */
static void check_following(void) {
    int64_t shared = take(3), kept = take(4), constants = take(4), lines = take(20), cells = 1 + take(20), l = take(2);
    int64_t own = 1 + l + kept, first = shared + own + constants, results = 2 + kept;
    double *constant = malloc(sizeof(double) * (size_t)constants + 1), *before, *after, given[3];
    double *norms = malloc(sizeof(double) * (size_t)cells), *looks = malloc(sizeof(double) * (size_t)(cells * l) + 1);
    struct line *line = malloc(sizeof *line * (size_t)lines + 1);
    int32_t *found = malloc(sizeof *found * (size_t)results);
    before = malloc(sizeof(double) * (size_t)(cells * kept) + 1);
    after = malloc(sizeof(double) * (size_t)(cells * results));
    for (int64_t i = 0; i < constants; i++) constant[i] = any_number();
    for (int64_t i = 0; i < shared; i++) given[i] = any_number();
    for (int64_t i = 0; i < cells; i++) norms[i] = any_number();
    for (int64_t i = 0; i < cells * l; i++) looks[i] = any_number();
    for (int64_t i = 0; i < cells * kept; i++) before[i] = any_number();
    for (int64_t i = 0; i < lines; i++) {
        unsigned known = (unsigned)(first + i);
        line[i] = (struct line){(int32_t)take(ARITHMETIC + 3), (int32_t)take(known), (int32_t)take(known), (int32_t)take(known)};
    }
    for (int64_t i = 0; i < results; i++) found[i] = (int32_t)take((unsigned)(first + lines));
    struct formula f = {shared, own, constants, lines, results, constant, line, found, 0, 0, 0, 0};
    CHECK(follow(&f, cells, given, norms, looks, l, before, after, NULL, 0) == 0);
    for (int64_t i = 0; i < cells; i++) {
        double number[MOST_NUMBERS];
        for (int64_t j = 0; j < shared; j++) number[j] = given[j];
        number[shared] = norms[i];
        for (int64_t j = 0; j < l; j++) number[shared + 1 + j] = looks[j * cells + i];
        for (int64_t j = 0; j < kept; j++) number[shared + 1 + l + j] = before[j * cells + i];
        for (int64_t j = 0; j < constants; j++) number[shared + own + j] = constant[j];
        for (int64_t j = 0; j < lines; j++) {
            struct line *x = line + j;
            number[first + j] = plain_result(x->code, number[x->a], number[x->b], number[x->c]);
        }
        for (int64_t j = 0; j < results; j++) CHECK(alike(after[j * cells + i], number[found[j]]));
    }
    free(constant);
    free(norms);
    free(looks);
    free(line);
    free(found);
    free(before);
    free(after);
}

/* A ring that numbers enter, or do not, and that starts afresh now and then, beside a plain list of what is in it. */
static void check_windows(void) {
    enum { STEPS = 40 };
    int64_t size = 1 + take(9), rows = 1 + 2 * size, results = 6;
    /* own: norm, seen. constants: a quantile, whether it enters. */
    double constant[] = {(double)take(65) / 64, 1};
    static const struct line line[] = {
        {WINDOW, 0, 1, 0}, {LENGTH, 4, 0, 0}, {QUANTILE, 4, 2, 0}, {MEAN, 4, 0, 0}, {DEVIATION, 4, 7, 0},
        {DISTANCES, 4, 6, 0}, {QUANTILE, 9, 2, 0}, {LOGS, 4, 0, 0}, {QUANTILE, 11, 2, 0},
    };
    static const int32_t found[] = {5, 6, 7, 8, 10, 12};
    struct formula f = {0, 2, 2, 9, results, constant, line, found, 1, 3, 1, 0};
    double *rings = malloc(sizeof(double) * (size_t)rows), *old = malloc(sizeof(double) * (size_t)rows);
    double *after = malloc(sizeof(double) * (size_t)(results + 2)), values[9] = {0}, seen = 0;
    memset(rings, 0, sizeof(double) * (size_t)rows);
    rings[0] = take(2) ? 0 : -1;
    for (int step = 0; step < STEPS; step++) {
        double norm = (double)take(50) / 16, held[9], far[9], sum = 0, squares = 0;
        int64_t length = seen < (double)size ? (int64_t)seen : size;
        constant[1] = take(4) > 0;
        memcpy(old, rings, sizeof(double) * (size_t)rows);
        CHECK(follow(&f, 1, NULL, &norm, NULL, 0, &seen, after, rings, size) == 0);
        memcpy(held, values, sizeof held);
        qsort(held, (size_t)length, sizeof *held, compare);
        CHECK(after[0] == (double)length);
        double position = constant[0] * (double)(length - 1);
        double low = length ? held[(int)position] : INFINITY, high = length ? held[(int)ceil(position)] : INFINITY;
        CHECK(after[1] == (low == high ? low : low + (high - low) * (position - floor(position))));
        for (int64_t i = 0; i < length; i++) sum += held[i];
        CHECK(fabs(after[2] * (double)(length ? length : 1) - sum) <= 1e-12 * sum);
        for (int64_t i = 0; i < length; i++) squares += (held[i] - after[2]) * (held[i] - after[2]);
        CHECK(fabs(after[3] - sqrt(squares)) <= 1e-12 * sqrt(squares));
        for (int64_t i = 0; i < length; i++) far[i] = fabs(held[i] - after[1]);
        qsort(far, (size_t)length, sizeof *far, compare);
        low = length ? far[(int)position] : INFINITY, high = length ? far[(int)ceil(position)] : INFINITY;
        CHECK(after[4] == (low == high ? low : low + (high - low) * (position - floor(position))));
        for (int64_t i = 0; i < length; i++) far[i] = log(held[i]);
        low = length ? far[(int)position] : INFINITY, high = length ? far[(int)ceil(position)] : INFINITY;
        CHECK(alike(after[5], low == high ? low : low + (high - low) * (position - floor(position))));
        int64_t place = (int64_t)after[results];
        CHECK(place == (constant[1] != 0 ? (int64_t)fmod(seen, (double)size) + 1 : 0));
        for (int64_t i = 1; i <= size; i++) CHECK(old[i] == (i == place ? after[results + 1] : rings[i]));
        if (constant[1] != 0) {
            values[(int64_t)fmod(seen, (double)size)] = norm;
            seen++;
        }
        if (take(16) == 1) seen = 0;
        for (int64_t i = 0; i < size; i++) CHECK(rings[1 + i] == values[i]);
    }
    free(rings);
    free(old);
    free(after);
}

static int is_fit(const struct fake *t, int32_t dim) {
    int32_t dims = t->described.ndim;
    int64_t count = count_of(t, (unsigned)dims);
    if (!t->is_dense || (dim >= dims && dims > 1)) return 0;
    return dim < 0 || dims <= 1 || count == 0 || t->shape[dim] == 1 || t->strides[dim] * t->shape[dim] == count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data;
    input_end = data + size;
    int64_t count = take(MOST + 1), rows;
    int32_t dim = (int32_t)take(4) - 1;
    struct team team = {(int32_t)take((unsigned)gradkeel_levels()) + 1, (int32_t)take(3) + 1, take(2) ? parallel : NULL};
    for (int64_t i = 0; i < count; i++) make(tensors + i);
    struct tensor *table = malloc((size_t)count * sizeof *table + 1);
    python = (struct python){.item = item_of, .export = export_fake};
    int64_t taken = describe(tensors, count, dim, table, &rows);
    CHECK(taken <= count);
    for (int64_t i = 0; i <= taken && i < count; i++) CHECK(is_fit(tensors + i, dim) == (i < taken));
    if (taken == count) {
        check_reading(table, count, rows, dim >= 0, &team);
        check_writing(table, count, rows, dim >= 0, &team);
        check_copying(table, count, &team);
        check_adding(table, count, &team);
    }
    free(table);
    for (int64_t i = 0; i < count; i++) free(tensors[i].described.data);
    check_following();
    check_windows();
    return 0;
}

#ifdef MAIN
int main(int argc, char **argv) {
    long rounds = argc > 1 ? atol(argv[1]) : 1000;
    uint64_t state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    for (long i = 0; i < rounds; i++) {
        uint8_t data[4096];
        for (size_t j = 0; j < sizeof data; j++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            data[j] = (uint8_t)(state >> 56);
        }
        LLVMFuzzerTestOneInput(data, sizeof data / (1 + state % 64));
    }
    return 0;
}
#endif
