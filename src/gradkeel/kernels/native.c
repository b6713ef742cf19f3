/* Norms, extremes, scaling, clamping, sums, copies and distances of many CPU tensors in one call.
 *
 * Plain C over data pointers: nothing of Python, torch or OpenMP is linked. What is needed of them comes in as a
 * function pointer: some of Python's stable ABI (struct python), torch's DLPack exporter (DLPack 1.x, struct
 * DLPackExchangeAPI), and the GOMP_parallel of the OpenMP library that torch has loaded, so that there is one pool of
 * threads in the process.
 *
 * Sums are float64, for 16-bit entries across runs of 1024: a float32 entry squared is at most 1.2e77, so they cannot
 * overflow, and a sum is NaN or inf exactly where an entry is. Work is cut into the same jobs whatever the number of threads,
 * and their results are put together in order: the same tensors give the same bits.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* ---- tensors ------------------------------------------------------------------------------------------------- */

enum kind { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };

/* A dense tensor: `rows` equal parts, one after the other in memory. */
struct tensor {
    void *data;
    int64_t entries;
    int64_t rows;
    int64_t kind;
};

/* DLPack's DLTensor, field by field. */
struct dltensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

enum { DL_CPU = 1, DL_FLOAT = 2, DL_BFLOAT = 4 };

/* What is needed of Python's stable ABI, and of torch. */
struct python {
    void *(*item)(void *list, intptr_t index);        /* PyList_GetItem */
    intptr_t (*length)(void *list);                   /* PyList_Size */
    long long (*whole)(void *number);                 /* PyLong_AsLongLong */
    double (*real)(void *number);                     /* PyFloat_AsDouble */
    void *(*memory)(const char *from, intptr_t size); /* PyByteArray_FromStringAndSize */
    char *(*content)(void *memory);                   /* PyByteArray_AsString */
    int (*is_of)(void *object, void *type);           /* PyObject_IsInstance */
    void *(*number)(long long value);                 /* PyLong_FromLongLong */
    void *(*float_of)(double value);                  /* PyFloat_FromDouble */
    void *(*list)(intptr_t length);                   /* PyList_New */
    int (*put)(void *list, intptr_t index, void *);   /* PyList_SetItem */
    void *(*error)(void);                             /* PyErr_Occurred */
    void *(*no_memory)(void);                         /* PyErr_NoMemory */
    void (*hold)(void *object);                       /* Py_IncRef */
    void (*release)(void *object);                    /* Py_DecRef */
    void *type_of_memory;                             /* bytearray */
    int (*export)(void *tensor, struct dltensor *to); /* DLPackExchangeAPI's dltensor_from_py_object_no_sync */
};

static struct python python;

EXPORT void gradkeel_python(const struct python *given) { python = *given; }

static int kind_of(const struct dltensor *t) {
    if (t->lanes != 1) return -1;
    if (t->code == DL_BFLOAT && t->bits == 16) return BFLOAT16;
    if (t->code != DL_FLOAT) return -1;
    return t->bits == 32 ? FLOAT32 : t->bits == 16 ? FLOAT16 : t->bits == 64 ? FLOAT64 : -1;
}

/* Whether the entries fill a block of memory without gaps or overlaps, in whatever order of the dimensions. */
static int is_dense(const struct dltensor *t) {
    int64_t expected = 1;
    uint64_t seen = 0;
    if (t->ndim > 64) return 0;
    for (int found = 0; found < t->ndim; found++) {
        int next = -1;
        for (int d = 0; d < t->ndim && next < 0; d++)
            if (!(seen >> d & 1) && (t->shape[d] == 1 || t->strides[d] == expected)) next = d;
        if (next < 0) return 0;
        seen |= (uint64_t)1 << next;
        expected *= t->shape[next];
    }
    return 1;
}

/* Fills `table` with the tensors of a Python list, each one row or, with more dimensions than one, as many as it is
 * long along `dim`, unless that is negative.
 *
 * Returns how many were taken: fewer than `count` at the first that is not a dense float tensor on CPU, or whose rows
 * do not lie one after the other, or that torch cannot export (a Python exception is then set). Needs the GIL.
 */
static int64_t describe(void *list, int64_t count, int64_t dim, struct tensor *table, int64_t *all_rows) {
    *all_rows = 0;
    for (int64_t i = 0; i < count; i++) {
        struct dltensor t;
        void *object = python.item(list, (intptr_t)i);
        if (object == NULL || python.export(object, &t) != 0) return i;
        int kind = kind_of(&t);
        if (t.device_type != DL_CPU || kind < 0) return i;
        t.data = (char *)t.data + t.byte_offset;
        if ((uintptr_t)t.data % (t.bits / 8) != 0) return i;
        int64_t entries = 1, rows = 1;
        for (int d = 0; d < t.ndim; d++) entries *= t.shape[d];
        if (dim >= 0 && t.ndim > 1) {
            if (dim >= t.ndim) return i;
            rows = t.shape[dim];
        }
        if (entries > 0 && (!is_dense(&t) || (rows > 1 && t.strides[dim] != entries / rows))) return i;
        table[i] = (struct tensor){t.data, entries, rows, kind};
        *all_rows += rows;
    }
    return count;
}

/* ---- entries --------------------------------------------------------------------------- */

typedef uint16_t __attribute__((may_alias)) u16;
typedef uint32_t __attribute__((may_alias)) u32;
typedef uint64_t __attribute__((may_alias)) u64;
typedef double __attribute__((may_alias)) f64;

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* float16 to float32: the exponent is moved; denormals go through an addition that normalizes them, so that this
 * also holds where the processor flushes denormals (Fabian Giesen, "float->half variants", 2012). */
INLINE float float_of_half(uint32_t half) {
    uint32_t bits = (half & 0x7fff) << 13, exponent = bits & 0x0f800000;
    bits += 0x38000000;
    bits += exponent == 0x0f800000 ? 0x38000000 : 0;
    bits += exponent == 0 ? 0x00800000 : 0;
    float magnitude = float_of(bits) - (exponent == 0 ? float_of(0x38800000) : 0.0f);
    return float_of(bits_of(magnitude) | (half & 0x8000) << 16);
}

/* float32 to float16, to nearest even; the same source. */
INLINE uint16_t half_of_float(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t tiny = bits_of(float_of(bits) + 0.5f) - 0x3f000000;
    uint32_t normal = (bits + 0xc8000fff + (bits >> 13 & 1)) >> 13;
    uint32_t special = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t half = bits < 0x38800000 ? tiny : normal;
    return (uint16_t)((bits >= 0x477ff000 ? special : half) | sign);
}

INLINE float float_of_bfloat(uint32_t bits) { return float_of(bits << 16); }

INLINE uint16_t bfloat_of_float(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE double entry(int kind, const void *data, int64_t i) {
    switch (kind) {
    case FLOAT32: return float_of(((const u32 *)data)[i]);
    case BFLOAT16: return float_of_bfloat(((const u16 *)data)[i]);
    case FLOAT16: return float_of_half(((const u16 *)data)[i]);
    default: return ((const f64 *)data)[i];
    }
}

/* ---- what is done to one run of entries ------------------------------------------------------------------------ */

struct reading {
    double power; /* sum of powers, or the largest magnitude */
    double low, high;
};

/* Plain loops, which the compiler turns into vectors: it may reorder sums (see hatch_build.py for the flags). */
#define SUM_OF(name, type)                                                                                           \
    INLINE double name(int kind, int squares, const void *data, int64_t count) {                                     \
        type sum = 0;                                                                                                \
        if (kind == BFLOAT16 && (uintptr_t)data % 4 == 0) { /* two at a time need no widening of integers */         \
            const u32 *pairs = data;                                                                                 \
            for (int64_t i = 0; i < count / 2; i++) {                                                                \
                type x = float_of(pairs[i] << 16), y = float_of(pairs[i] & 0xffff0000);                              \
                sum += squares ? x * x : __builtin_fabs##type(x);                                                    \
                sum += squares ? y * y : __builtin_fabs##type(y);                                                    \
            }                                                                                                        \
            if (count % 2 == 0) return sum;                                                                          \
            data = (const u16 *)data + (count - 1);                                                                  \
            count = 1;                                                                                               \
        }                                                                                                            \
        for (int64_t i = 0; i < count; i++) {                                                                        \
            type x = (type)entry(kind, data, i);                                                                     \
            sum += squares ? x * x : __builtin_fabs##type(x);                                                        \
        }                                                                                                            \
        return sum;                                                                                                  \
    }

#define __builtin_fabsdouble __builtin_fabs
#define __builtin_fabsfloat __builtin_fabsf

SUM_OF(wide_sum, double)
SUM_OF(narrow_sum, float)

/* 16-bit entries are summed in float32, which is several times as fast, but never more of them than this: 8 digits
 * of entries that have 3. Where such a sum leaves float32's range, or is so small that squares
 * which a processor may flush to zero would count in it, it is made again in float64. */
#define SHORT 1024

INLINE double sum_of(int kind, int squares, const void *data, int64_t count) {
    if (kind == FLOAT32 || kind == FLOAT64) return wide_sum(kind, squares, data, count);
    double sum = 0;
    for (int64_t i = 0; i < count; i += SHORT) {
        const u16 *here = (const u16 *)data + i;
        int64_t entries = count - i < SHORT ? count - i : SHORT;
        double part = narrow_sum(kind, squares, here, entries);
        sum += part > 1e-27 && part < 1e38 ? part : wide_sum(kind, squares, here, entries);
    }
    return sum;
}

/* Magnitudes are ordered as their bits are, NaN above inf; so are, once negative ones are flipped, signed entries. */
#define EXTREMES(bits, unsigned_type, signed_type)                                                                   \
    INLINE double largest_##bits(int kind, const u##bits *data, int64_t count) {                                     \
        const unsigned_type all = (unsigned_type)~(unsigned_type)0 >> 1;                                             \
        unsigned_type most = 0;                                                                                      \
        for (int64_t i = 0; i < count; i++) {                                                                        \
            unsigned_type x = data[i] & all;                                                                         \
            most = x > most ? x : most;                                                                              \
        }                                                                                                            \
        return entry(kind, &most, 0);                                                                                \
    }                                                                                                                \
    INLINE void range_##bits(int kind, const u##bits *data, int64_t count, double *low, double *high) {              \
        const unsigned_type all = (unsigned_type)~(unsigned_type)0 >> 1;                                             \
        signed_type least = (signed_type)all, most = (signed_type)~all;                                              \
        for (int64_t i = 0; i < count; i++) {                                                                        \
            signed_type x = (signed_type)data[i];                                                                    \
            x ^= (signed_type)((x >> (bits - 1)) & (signed_type)all);                                                \
            least = x < least ? x : least;                                                                           \
            most = x > most ? x : most;                                                                              \
        }                                                                                                            \
        least ^= (signed_type)((least >> (bits - 1)) & (signed_type)all);                                            \
        most ^= (signed_type)((most >> (bits - 1)) & (signed_type)all);                                              \
        *low = entry(kind, &least, 0);                                                                               \
        *high = entry(kind, &most, 0);                                                                               \
    }

EXTREMES(16, uint16_t, int16_t)
EXTREMES(32, uint32_t, int32_t)
EXTREMES(64, uint64_t, int64_t)

enum norm { LARGEST, SUM, SQUARES };

/* The sum of squares of how far entries are from others of the same kind. */
INLINE double distance_of(int kind, const void *data, const void *from, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        double x = entry(kind, data, i) - entry(kind, from, i);
        sum += x * x;
    }
    return sum;
}

INLINE double power_of(int kind, int norm, const void *data, int64_t count) {
    if (norm != LARGEST) return sum_of(kind, norm == SQUARES, data, count);
    if (kind == FLOAT32) return largest_32(kind, data, count);
    return kind == FLOAT64 ? largest_64(kind, data, count) : largest_16(kind, data, count);
}

INLINE void range_of(int kind, const void *data, int64_t count, double *low, double *high) {
    if (kind == FLOAT32) {
        range_32(kind, data, count, low, high);
    } else if (kind == FLOAT64) {
        range_64(kind, data, count, low, high);
    } else {
        range_16(kind, data, count, low, high);
    }
}

/* NaN wins, as in torch. */
INLINE double larger(double a, double b) { return a != a || a > b ? a : b; }
INLINE double smaller(double a, double b) { return a != a || a < b ? a : b; }

INLINE void join(int norm, struct reading *whole, const struct reading *part) {
    whole->power = norm == LARGEST ? larger(whole->power, part->power) : whole->power + part->power;
    whole->low = smaller(whole->low, part->low);
    whole->high = larger(whole->high, part->high);
}

/* Runs this long stay in the nearest cache while they are looked at for power and range. */
#define BLOCK 4096

INLINE size_t width(int kind) { return kind == FLOAT64 ? 8 : kind == FLOAT32 ? 4 : 2; }

INLINE struct reading read_run(int kind, int norm, int range, const char *data, int64_t count) {
    struct reading whole = {0, __builtin_inf(), -__builtin_inf()};
    int64_t size = range ? BLOCK : count;
    for (int64_t i = 0; i < count; i += size) {
        int64_t here = count - i < size ? count - i : size;
        struct reading part = whole;
        part.power = power_of(kind, norm, data + (size_t)i * width(kind), here);
        if (range) range_of(kind, data + (size_t)i * width(kind), here, &part.low, &part.high);
        join(norm, &whole, &part);
    }
    return whole;
}

/* Factors and limits are rounded to the type in which torch multiplies and compares: float32, float64 for float64. */
INLINE void scale_run(int kind, void *data, int64_t count, double factor) {
    float f = (float)factor;
    switch (kind) {
    case FLOAT32:
        for (int64_t i = 0; i < count; i++) ((u32 *)data)[i] = bits_of(float_of(((u32 *)data)[i]) * f);
        break;
    case BFLOAT16:
        for (int64_t i = 0; i < count; i++)
            ((u16 *)data)[i] = bfloat_of_float(float_of_bfloat(((u16 *)data)[i]) * f);
        break;
    case FLOAT16:
        for (int64_t i = 0; i < count; i++) ((u16 *)data)[i] = half_of_float(float_of_half(((u16 *)data)[i]) * f);
        break;
    default: {
        f64 *x = data;
        for (int64_t i = 0; i < count; i++) x[i] *= factor;
    }
    }
}

#define CLAMPED(x, low, high) ((x) < (low) ? (low) : (x) > (high) ? (high) : (x))

INLINE void clamp_run(int kind, void *data, int64_t count, double low, double high) {
    float l = (float)low, h = (float)high;
    switch (kind) {
    case FLOAT32:
        for (int64_t i = 0; i < count; i++) {
            float x = float_of(((u32 *)data)[i]);
            ((u32 *)data)[i] = bits_of(CLAMPED(x, l, h));
        }
        break;
    case BFLOAT16:
        for (int64_t i = 0; i < count; i++) {
            float x = float_of_bfloat(((u16 *)data)[i]);
            ((u16 *)data)[i] = bfloat_of_float(CLAMPED(x, l, h));
        }
        break;
    case FLOAT16:
        for (int64_t i = 0; i < count; i++) {
            float x = float_of_half(((u16 *)data)[i]);
            ((u16 *)data)[i] = half_of_float(CLAMPED(x, l, h));
        }
        break;
    default: {
        f64 *x = data;
        for (int64_t i = 0; i < count; i++) x[i] = CLAMPED(x[i], low, high);
    }
    }
}

/* Each entry takes on the sum's type, then is added. */
INLINE void add_run(int kind, const void *data, int64_t count, int sum_kind, void *sum) {
    if (sum_kind == FLOAT64) {
        for (int64_t i = 0; i < count; i++) ((f64 *)sum)[i] += entry(kind, data, i);
    } else {
        for (int64_t i = 0; i < count; i++)
            ((u32 *)sum)[i] = bits_of(float_of(((u32 *)sum)[i]) + (float)entry(kind, data, i));
    }
}

/* ---- jobs: what one thread does at a time ----------------------------------------------------------------------- */

/* Long enough to make taking a job cheap, short enough that all threads end at about the same time. */
#define RUN 65536

/* Fewer entries than this, 30 us of one thread, are not worth waiting for another. */
#define GRAIN 262144

/* Some rows of a tensor, or with `is_part` a part of one row. */
struct job {
    char *data;
    int64_t count; /* entries of each row that are in this job */
    int64_t rows;
    int64_t row; /* index of the first of them among the rows of all tensors */
    int64_t tensor;
    int kind, is_part;
};

enum operation { READ, SCALE, CLAMP, ADD, COPY };

/* What has a factor of its own: each tensor, each row, or nothing, where all have the same. */
enum share { OF_TENSOR, OF_ROW, OF_ALL };

struct task {
    enum operation operation;
    int norm, range;           /* READ: what is wanted */
    struct reading *readings;  /* READ: of each job */
    double *units;             /* READ: power of each row; NULL if not wanted */
    const double *factors;     /* SCALE */
    enum share share;          /* SCALE: what has a factor of its own */
    double low, high;          /* CLAMP */
    /* ADD, COPY: the tensors, and what each is added or copied to; READ: from what each one's distance is wanted, or NULL */
    const struct tensor *table, *others;
    const struct job *jobs;
    int64_t count, next, threads;
};

/* Where the entries of a job are in the other tensor. */
INLINE void *beside(const struct task *task, int kind, const struct job *job) {
    const struct tensor *other = task->others + job->tensor;
    size_t first = (size_t)(job->data - (const char *)task->table[job->tensor].data) / width(kind);
    return (char *)other->data + first * width((int)other->kind);
}

INLINE void read_job(struct task *task, int kind, const struct job *job) {
    struct reading *whole = task->readings + (job - task->jobs);
    *whole = (struct reading){0, __builtin_inf(), -__builtin_inf()};
    if (task->others != NULL) {
        whole->power = distance_of(kind, job->data, beside(task, kind, job), job->count * job->rows);
        return;
    }
    for (int64_t i = 0; i < job->rows; i++) {
        const char *data = job->data + (size_t)(i * job->count) * width(kind);
        struct reading part = read_run(kind, task->norm, task->range, data, job->count);
        if (task->units != NULL && !job->is_part) task->units[job->row + i] = part.power;
        join(task->norm, whole, &part);
    }
}

INLINE void scale_job(const struct task *task, int kind, const struct job *job) {
    for (int64_t i = 0; i < job->rows; i++) {
        int64_t index = task->share == OF_ROW ? job->row + i : task->share == OF_TENSOR ? job->tensor : 0;
        double factor = task->factors[index];
        if (factor != 1.0) scale_run(kind, job->data + (size_t)(i * job->count) * width(kind), job->count, factor);
    }
}

INLINE void add_job(const struct task *task, int kind, const struct job *job) {
    void *to = beside(task, kind, job);
    if (task->others[job->tensor].kind == FLOAT64) {
        add_run(kind, job->data, job->count * job->rows, FLOAT64, to);
    } else {
        add_run(kind, job->data, job->count * job->rows, FLOAT32, to);
    }
}

INLINE void do_job(struct task *task, int kind, const struct job *job) {
    switch (task->operation) {
    case READ: read_job(task, kind, job); break;
    case SCALE: scale_job(task, kind, job); break;
    case CLAMP: clamp_run(kind, job->data, job->count * job->rows, task->low, task->high); break;
    case ADD: add_job(task, kind, job); break;
    case COPY: memcpy(beside(task, kind, job), job->data, (size_t)(job->count * job->rows) * width(kind)); break;
    }
}

/* Takes jobs until none is left: many at a time at first, one at a time at the end. */
INLINE void work(struct task *task) {
    int64_t first = __atomic_load_n(&task->next, __ATOMIC_RELAXED);
    while (first < task->count) {
        int64_t end = first + 1 + (task->count - first - 1) / (4 * task->threads);
        if (!__atomic_compare_exchange_n(&task->next, &first, end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
        for (; first < end; first++) {
            const struct job *job = task->jobs + first;
            switch (job->kind) { /* so that each kind has a loop of its own */
            case FLOAT32: do_job(task, FLOAT32, job); break;
            case BFLOAT16: do_job(task, BFLOAT16, job); break;
            case FLOAT16: do_job(task, FLOAT16, job); break;
            default: do_job(task, FLOAT64, job);
            }
        }
        first = __atomic_load_n(&task->next, __ATOMIC_RELAXED);
    }
}

/* The same code for each level of the processor; chosen when the program runs. */
static void work_plainly(void *task) { work(task); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void work_avx2(void *task) { work(task); }

__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) static void work_avx512(void *task) {
    work(task);
}
#endif

/* Raised with every change of what is exported, so that native.py never calls a library of another time. */
EXPORT int32_t gradkeel_interface(void) { return 12; }

/* How many of the levels baseline, AVX2 and AVX-512 this processor has: from 1 to 3. */
EXPORT int32_t gradkeel_levels(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!avx2) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? 3
               : 2;
#else
    return 1;
#endif
}

/* ---- one call ----------------------------------------------------------------------------------------------------- */

/* How the work is done: the processor's level, and the threads of the OpenMP library that torch has loaded. */
struct team {
    int32_t level;
    int32_t threads;
    void (*parallel)(void (*function)(void *), void *argument, unsigned threads, unsigned flags);
};

static int64_t parts_of(int64_t count) { return (count + RUN - 1) / RUN; }

static int64_t rows_at_once(int64_t count) { return count < RUN ? RUN / (count > 0 ? count : 1) : 1; }

static int64_t jobs_of(const struct tensor *t) {
    if (t->entries == 0) return 0;
    int64_t count = t->entries / t->rows, together = rows_at_once(count);
    return count > RUN ? t->rows * parts_of(count) : (t->rows + together - 1) / together;
}

static struct job *cut(const struct tensor *t, int64_t tensor, int64_t row, struct job *job) {
    int64_t count = t->entries / t->rows, together = rows_at_once(count);
    int kind = (int)t->kind;
    for (int64_t i = 0; i < t->rows; i += together) {
        char *data = (char *)t->data + (size_t)(i * count) * width(kind);
        if (count <= RUN) {
            int64_t rows = t->rows - i < together ? t->rows - i : together;
            *job++ = (struct job){data, count, rows, row + i, tensor, kind, 0};
            continue;
        }
        for (int64_t from = 0; from < count; from += RUN) {
            int64_t here = count - from < RUN ? count - from : RUN;
            *job++ = (struct job){data + (size_t)from * width(kind), here, 1, row + i, tensor, kind, 1};
        }
    }
    return job;
}

/* Cuts the tensors into jobs and has them done; returns the jobs, to be freed, or NULL without memory. */
static struct job *run(struct task *task, const struct tensor *table, int64_t count, const struct team *team) {
    int64_t entries = 0, row = 0;
    task->count = 0;
    for (int64_t i = 0; i < count; i++) {
        entries += table[i].entries;
        task->count += jobs_of(table + i);
    }
    size_t size = (size_t)task->count * (sizeof(struct job) + sizeof(struct reading));
    struct job *jobs = malloc(size ? size : 1), *end = jobs;
    if (jobs == NULL) return NULL;
    for (int64_t i = 0; i < count; i++) {
        if (table[i].entries > 0) end = cut(table + i, i, row, end);
        row += table[i].rows;
    }
    task->jobs = jobs;
    task->readings = (struct reading *)end;
    void (*function)(void *) = work_plainly;
#if defined(__x86_64__)
    if (team->level == 2) function = work_avx2;
    if (team->level >= 3) function = work_avx512;
#endif
    task->next = 0;
    task->threads = team->parallel == NULL || entries < GRAIN ? 1 : team->threads;
    if (task->threads > 1) {
        team->parallel(function, task, (unsigned)task->threads, 0);
    } else {
        task->threads = 1;
        function(task);
    }
    return jobs;
}

/* The norm of `count` entries from their power; relative to the largest one where squares of float64 entries left the
 * range of float64. */
static double norm_of(int norm, double power, int64_t kind, const void *data, const void *from, int64_t count) {
    double value = norm == SQUARES ? __builtin_sqrt(power) : power;
    if (kind != FLOAT64 || norm == LARGEST || (value > 1e-140 && value < 1e150)) return value;
    const f64 *x = data, *y = from;
    double largest = 0, sum = 0;
    for (int64_t i = 0; i < count; i++) largest = larger(largest, __builtin_fabs(x[i] - (y == NULL ? 0 : y[i])));
    if (!(largest > 0 && largest < __builtin_inf())) return largest;
    for (int64_t i = 0; i < count; i++) {
        double part = __builtin_fabs(x[i] - (y == NULL ? 0 : y[i])) / largest;
        sum += norm == SQUARES ? part * part : part;
    }
    return (norm == SQUARES ? __builtin_sqrt(sum) : sum) * largest;
}

/* Reads each tensor once.
 *
 * norm: 0 the largest magnitude, 1 the sum of magnitudes, 2 the root of the sum of squares. norms [count] and, where
 * not NULL, units [sum of rows] and peaks [count, 2] are written; NaN or inf exactly where an entry is. Where `from` is
 * not NULL, the norm is 2 and nothing else is wanted, norms are those of each tensor's distance from the one of the same
 * index there. Returns 0, 1 where that is of another size or kind, or -1 without memory.
 */
EXPORT int32_t gradkeel_read(const struct tensor *table, int64_t count, int32_t norm, double *norms, double *units,
                             double *peaks, const struct tensor *from, const struct team *team) {
    struct task task = {.operation = READ, .norm = norm, .range = peaks != NULL, .units = units, .table = table,
                        .others = from};
    for (int64_t i = 0; from != NULL && i < count; i++)
        if (from[i].entries != table[i].entries || from[i].kind != table[i].kind) return 1;
    int64_t rows = 0;
    for (int64_t i = 0; i < count; i++) rows += table[i].rows;
    if (units != NULL) memset(units, 0, (size_t)rows * sizeof *units);
    struct job *jobs = run(&task, table, count, team);
    if (jobs == NULL) return -1;
    for (int64_t i = 0, next = 0; i < count; i++) {
        struct reading whole = {0, __builtin_inf(), -__builtin_inf()};
        for (; next < task.count && jobs[next].tensor == i; next++) {
            struct reading *part = task.readings + next;
            join(norm, &whole, part);
            if (units != NULL && jobs[next].is_part) {
                double *unit = units + jobs[next].row;
                *unit = norm == LARGEST ? larger(part->power, *unit) : *unit + part->power;
            }
        }
        const void *other = from == NULL ? NULL : from[i].data;
        norms[i] = norm_of(norm, whole.power, table[i].kind, table[i].data, other, table[i].entries);
        if (peaks != NULL) {
            int is_nan = whole.low != whole.low || whole.high != whole.high;
            peaks[2 * i] = table[i].entries == 0 ? 0 : is_nan ? __builtin_nan("") : whole.low;
            peaks[2 * i + 1] = table[i].entries == 0 ? 0 : is_nan ? __builtin_nan("") : whole.high;
        }
    }
    for (int64_t i = 0; units != NULL && i < count; units += table[i++].rows) {
        int64_t size = table[i].rows > 0 ? table[i].entries / table[i].rows : 0;
        for (int64_t j = 0; j < table[i].rows; j++) {
            const char *data = (const char *)table[i].data + (size_t)(j * size) * width((int)table[i].kind);
            units[j] = norm_of(norm, units[j], table[i].kind, data, NULL, size);
        }
    }
    free(jobs);
    return 0;
}

/* The norm of all tensors together, from theirs: relative to the largest one where squares leave the range. */
EXPORT double gradkeel_total(const double *norms, int64_t count, int32_t norm) {
    double largest = 0, sum = 0;
    for (int64_t i = 0; i < count; i++) largest = larger(largest, norms[i]);
    if (norm == LARGEST || !(largest > 0 && largest < __builtin_inf())) return largest;
    double scale = norm == SUM || (largest > 1e-140 && largest < 1e140) ? 1 : largest;
    for (int64_t i = 0; i < count; i++) {
        double part = norms[i] / scale;
        sum += norm == SQUARES ? part * part : part;
    }
    return scale * (norm == SQUARES ? __builtin_sqrt(sum) : sum);
}

/* Whether no two of the tensors begin at one address; also 0 without memory. */
static int32_t are_apart(const struct tensor *table, int64_t count) {
    int bits = 4;
    while ((int64_t)1 << bits < 2 * count) bits++;
    uint64_t mask = ((uint64_t)1 << bits) - 1;
    const void **seen = calloc((size_t)1 << bits, sizeof *seen);
    int32_t apart = seen != NULL;
    for (int64_t i = 0; apart && i < count; i++) {
        if (table[i].entries == 0) continue;
        uint64_t place = ((uint64_t)(uintptr_t)table[i].data * 0x9e3779b97f4a7c15u) >> (64 - bits);
        while (seen[place] != NULL && seen[place] != table[i].data) place = (place + 1) & mask;
        apart = seen[place] == NULL;
        seen[place] = table[i].data;
    }
    free(seen);
    return apart;
}

/* Multiplies everything by its factor (see enum share); where that is 1 nothing is touched. */
EXPORT int32_t gradkeel_scale(const struct tensor *table, int64_t count, const double *factors, int32_t share,
                              const struct team *team) {
    struct task task = {.operation = SCALE, .factors = factors, .share = (enum share)share};
    struct job *jobs = run(&task, table, count, team);
    free(jobs);
    return jobs == NULL ? -1 : 0;
}

/* Clamps every entry into [low, high]; NaN stays. */
EXPORT int32_t gradkeel_clamp(const struct tensor *table, int64_t count, double low, double high,
                              const struct team *team) {
    struct task task = {.operation = CLAMP, .low = low, .high = high};
    struct job *jobs = run(&task, table, count, team);
    free(jobs);
    return jobs == NULL ? -1 : 0;
}

/* Adds each tensor to the one of the same index in `sums`: float32 or float64, of as many entries in the same order. */
EXPORT int32_t gradkeel_add(const struct tensor *sums, const struct tensor *table, int64_t count,
                            const struct team *team) {
    struct task task = {.operation = ADD, .table = table, .others = sums};
    struct job *jobs = run(&task, table, count, team);
    free(jobs);
    return jobs == NULL ? -1 : 0;
}

/* Copies the tensors to `memory`, one after the other, each from a multiple of 64 bytes on; `copies` [count] is written. */
EXPORT int32_t gradkeel_copy(const struct tensor *table, int64_t count, struct tensor *copies, char *memory,
                             const struct team *team) {
    struct task task = {.operation = COPY, .table = table, .others = copies};
    for (int64_t i = 0; i < count; i++) {
        copies[i] = table[i];
        copies[i].data = memory;
        memory += ((size_t)table[i].entries * width((int)table[i].kind) + 63) / 64 * 64;
    }
    struct job *jobs = run(&task, table, count, team);
    free(jobs);
    return jobs == NULL ? -1 : 0;
}

/* ---- formulas ---------------------------------------------------------------------------------------------------- */

/* In the order of formulas.py's numbers for them. */
enum code {
    PLUS, MINUS, TIMES, OVER, BOTH, EITHER, LESS, AT_MOST, MORE, AT_LEAST, EQUAL, UNEQUAL, NEGATIVE, MAGNITUDE, NOT,
    CHOSEN, MAXIMUM, MINIMUM, IS_NORM, IS_NUMBER, AS_REAL, ROOT, LOG, EXP, EXPM1,
    WINDOW, LENGTH, QUANTILE, MEAN, DEVIATION, LOGS, DISTANCES
};

/* One operation on what stands at three places; its result is the next. */
struct line {
    int32_t code, a, b, c;
};

/* Its numbers are in this order: what all cells share, what each has of its own, constants, the results of the lines.
 * What comes of a cell are the numbers at the places `found`. Where it looks at a cell's last norms, each cell has a ring
 * of them too, which the number at `value` enters where that at `condition` is not 0. */
struct formula {
    int64_t shared, own, constants, lines, results;
    const double *constant;
    const struct line *line;
    const int32_t *found;
    int32_t has_ring, condition, seen, value;
};

/* So many cells go through the lines together, so that the compiler makes vectors of them. */
enum { MOST_NUMBERS = 256, TOGETHER = 8 };

#define EACH(name, value)                                                                                             \
    case name:                                                                                                       \
        for (int i = 0; i < TOGETHER; i++) to[i] = (value);                                                          \
        break

/* Neighbours have mostly the same number where it counts steps. */
#define EACH_CALL(name, function)                                                                                     \
    case name:                                                                                                       \
        for (int i = 0; i < count; i++) to[i] = i > 0 && a[i] == a[i - 1] ? to[i - 1] : function(a[i]);              \
        break

static void operate(int32_t code, const double *a, const double *b, const double *c, double *to, int count) {
    switch ((enum code)code) {
        EACH(PLUS, a[i] + b[i]);
        EACH(MINUS, a[i] - b[i]);
        EACH(TIMES, a[i] * b[i]);
        EACH(OVER, a[i] / b[i]);
        EACH(BOTH, a[i] != 0 && b[i] != 0);
        EACH(EITHER, a[i] != 0 || b[i] != 0);
        EACH(LESS, a[i] < b[i]);
        EACH(AT_MOST, a[i] <= b[i]);
        EACH(MORE, a[i] > b[i]);
        EACH(AT_LEAST, a[i] >= b[i]);
        EACH(EQUAL, a[i] == b[i]);
        EACH(UNEQUAL, a[i] != b[i]);
        EACH(NEGATIVE, -a[i]);
        EACH(MAGNITUDE, fabs(a[i]));
        EACH(NOT, a[i] == 0);
        EACH(CHOSEN, a[i] != 0 ? b[i] : c[i]);
        EACH(MAXIMUM, a[i] >= b[i] || a[i] != a[i] ? a[i] : b[i]);
        EACH(MINIMUM, a[i] <= b[i] || a[i] != a[i] ? a[i] : b[i]);
        EACH(IS_NORM, a[i] > 0 && a[i] < INFINITY);
        EACH(IS_NUMBER, a[i] > -INFINITY && a[i] < INFINITY);
        EACH(AS_REAL, a[i]);
        EACH(ROOT, sqrt(a[i]));
        EACH_CALL(LOG, log);
        EACH_CALL(EXP, exp);
        EACH_CALL(EXPM1, expm1);
    default: break;
    }
}

/* ---- a cell's last norms ------------------------------------------------------------------------------------------- */

/* In the order of the ring, and below that sorted, if the first `ordered` of the ring are, else below zero. */
struct ring {
    double *ordered, *values, *sorted;
    int64_t size;
};

/* Numbers, ascending. */
struct window {
    double *values;
    int64_t length;
};

static struct ring ring_at(double *memory, int64_t size) {
    return (struct ring){memory, memory + 1, memory + 1 + size, size};
}

static int64_t length_after(double seen, int64_t size) { return !(seen >= 1) ? 0 : seen < (double)size ? (int64_t)seen : size; }

/* NaN is the last. */
static int compare(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return a != a || b != b ? (a != a) - (b != b) : (a > b) - (a < b);
}

static struct window sorted_into(double *to, const struct ring *ring, int64_t length) {
    memcpy(to, ring->values, (size_t)length * sizeof *to);
    qsort(to, (size_t)length, sizeof *to, compare);
    return (struct window){to, length};
}

/* How many of the sorted numbers are below `value`, or with `also` not above it; all of them, for NaN is the last. */
static int64_t place_of(const double *sorted, int64_t length, double value, int also) {
    int64_t low = value == value ? 0 : length;
    while (low < length) {
        int64_t middle = low + (length - low) / 2;
        if (sorted[middle] < value || (also && sorted[middle] == value)) {
            low = middle + 1;
        } else {
            length = middle;
        }
    }
    return low;
}

/* One more number, after `seen` ones; says in `went` where it went, counted from 1, and what was there. */
static void enter(struct ring *ring, double seen, double value, double went[2]) {
    double *sorted = ring->sorted;
    int64_t length = length_after(seen, ring->size);
    int64_t place = seen >= 1 && seen < INFINITY ? (int64_t)fmod(seen, (double)ring->size) : 0;
    went[0] = (double)(place + 1);
    went[1] = ring->values[place];
    if (*ring->ordered != (double)length) sorted_into(sorted, ring, length);
    if (length == ring->size) {
        int64_t gone = place_of(sorted, --length, ring->values[place], 0);
        memmove(sorted + gone, sorted + gone + 1, (size_t)(length - gone) * sizeof *sorted);
    }
    int64_t next = place_of(sorted, length, value, 1);
    memmove(sorted + next + 1, sorted + next, (size_t)(length - next) * sizeof *sorted);
    sorted[next] = ring->values[place] = value;
    *ring->ordered = (double)(length + 1);
}

static double quantile(struct window w, double q) {
    if (w.length == 0) return INFINITY;
    double position = (q > 0 ? smaller(q, 1) : 0) * (double)(w.length - 1);
    int64_t below = (int64_t)position;
    double low = w.values[below], high = w.values[(int64_t)ceil(position)];
    return low == high ? low : low + (high - low) * (position - (double)below);
}

static double mean(struct window w) {
    double sum = 0;
    for (int64_t i = 0; i < w.length; i++) sum += w.values[i];
    return sum / (double)(w.length > 0 ? w.length : 1);
}

/* The root of the sum of squared distances; the largest is divided out, for its square may be out of range. */
static double deviation(struct window w, double center) {
    double most = 0, sum = 0;
    for (int64_t i = 0; i < w.length; i++) most = larger(most, fabs(w.values[i] - center));
    if (!(most > 0 && most < INFINITY)) return most;
    for (int64_t i = 0; i < w.length; i++) {
        double part = (w.values[i] - center) / most;
        sum += part * part;
    }
    return sqrt(sum) * most;
}

static struct window logs(struct window w, double *to) {
    for (int64_t i = 0; i < w.length; i++) to[i] = log(w.values[i]);
    return (struct window){to, w.length};
}

/* From the center outwards on both sides, the nearer of the two first. */
static struct window distances(struct window w, double center, double *to) {
    int64_t above = place_of(w.values, w.length, center, 1), below = above - 1;
    for (int64_t i = 0; i < w.length; i++) {
        double down = below < 0 ? INFINITY : fabs(center - w.values[below]);
        double up = above >= w.length ? INFINITY : fabs(w.values[above] - center);
        int goes_down = above >= w.length || (below >= 0 && !(up < down)); /* NaN, which is above, comes last */
        to[i] = goes_down ? down : up;
        if (goes_down) {
            below--;
        } else {
            above++;
        }
    }
    return (struct window){to, w.length};
}

/* What a line on windows gives: a number, or a window at its own place; `scratch` has room for one. */
static double look(const struct line *l, double (*number)[TOGETHER], struct window *window, const struct ring *ring,
                   int64_t own, double *scratch) {
    double b = number[l->b][0];
    switch ((enum code)l->code) {
    case WINDOW: {
        int64_t length = length_after(b, ring->size);
        int is_sorted = *ring->ordered == (double)length;
        window[own] = is_sorted ? (struct window){ring->sorted, length} : sorted_into(scratch, ring, length);
        return 0;
    }
    case LOGS: window[own] = logs(window[l->a], scratch); return 0;
    case DISTANCES: window[own] = distances(window[l->a], b, scratch); return 0;
    case LENGTH: return (double)window[l->a].length;
    case QUANTILE: return quantile(window[l->a], b);
    case MEAN: return mean(window[l->a]);
    default: return deviation(window[l->a], b);
    }
}

/* Follows a formula for each of `cells`. What they have of their own stands in `norms` [cells], the first, in `looks`
 * [l, cells], and in `before` [own - 1 - l, cells]; `after` [results, cells] is written. Where there are `rings`
 * [cells, 1 + 2 * size], norms enter them, and [cells, 2] behind the results say where, if they do, and what was there
 * before. Returns 0, or -1 without memory, and nothing has changed. */
static int follow(const struct formula *f, int64_t cells, const double *shared, const double *norms,
                  const double *looks, int64_t l, const double *before, double *after, double *rings, int64_t size) {
    double number[MOST_NUMBERS][TOGETHER], *scratch = NULL;
    struct window window[MOST_NUMBERS];
    int64_t constants = f->shared + f->own, first = constants + f->constants;
    int64_t together = f->has_ring ? 1 : TOGETHER;
    if (f->has_ring) {
        scratch = malloc(sizeof *scratch * (size_t)(f->lines * size + 1));
        if (scratch == NULL) return -1;
    }
    for (int64_t j = 0; j < first; j++) {
        double value = j < f->shared ? shared[j] : j < constants ? 1 : f->constant[j - constants];
        for (int i = 0; i < TOGETHER; i++) number[j][i] = value;
    }
    for (int64_t i = 0; i < cells; i += together) {
        int count = (int)(cells - i < together ? cells - i : together);
        for (int64_t j = 0; j < f->own; j++) {
            const double *from = j == 0 ? norms : j <= l ? looks + (j - 1) * cells : before + (j - 1 - l) * cells;
            memcpy(number[f->shared + j], from + i, (size_t)count * sizeof *from);
        }
        struct ring ring = {NULL, NULL, NULL, 0};
        if (f->has_ring) ring = ring_at(rings + i * (1 + 2 * size), size);
        for (int64_t j = 0; j < f->lines; j++) {
            const struct line *line = f->line + j;
            if (line->code < WINDOW) {
                operate(line->code, number[line->a], number[line->b], number[line->c], number[first + j], count);
            } else {
                number[first + j][0] = look(line, number, window, &ring, first + j, scratch + j * size);
            }
        }
        for (int64_t j = 0; j < f->results; j++)
            memcpy(after + j * cells + i, number[f->found[j]], (size_t)count * sizeof *after);
        if (!f->has_ring) continue;
        double *went = after + f->results * cells + 2 * i;
        went[0] = went[1] = 0;
        if (number[f->condition][0] != 0) enter(&ring, number[f->seen][0], number[f->value][0], went);
    }
    free(scratch);
    return 0;
}

/* ---- called by Python -------------------------------------------------------------------------------------------- */

/* As functions of Python's own (METH_FASTCALL), and not through ctypes, where a call takes a microsecond longer: they hold
 * the GIL, and raise what torch raises. Addresses are numbers. */

static void *pointer(void *number) { return (void *)(intptr_t)python.whole(number); }

/* What stands before the table in the memory that `describe` returns. */
struct answer {
    int64_t taken, rows, table;
    double total;
    int32_t is_read, are_apart, is_wide, unused;
};

/* describe(list, dim, norm, team, norms): a table of the tensors of a list, see `describe` above. Where norm is not below
 * zero and they are few entries they are read at once, into a bytearray of [count] norms, so that a small model costs one
 * call: for more the GIL would keep others waiting.
 *
 * Returns a bytearray: a struct answer and the table. `taken` is how many tensors were fit, and the
 * rest is there if all were; is_read tells whether norms and total were written, or, below zero, that there was no memory.
 */
EXPORT void *gradkeel_describe(void *self, void *const *arguments, intptr_t given) {
    (void)self, (void)given;
    void *list = arguments[0];
    int64_t count = python.length(list), dim = python.whole(arguments[1]), norm = python.whole(arguments[2]);
    const struct team *team = pointer(arguments[3]);
    if (python.error()) return NULL;
    size_t size = sizeof(struct answer) + (size_t)count * sizeof(struct tensor);
    void *memory = python.memory(NULL, (intptr_t)size);
    if (memory == NULL) return NULL;
    struct answer *answer = (struct answer *)python.content(memory);
    struct tensor *table = (struct tensor *)(answer + 1);
    *answer = (struct answer){.table = (int64_t)(intptr_t)table};
    answer->taken = describe(list, count, dim, table, &answer->rows);
    if (python.error()) {
        python.release(memory);
        return NULL;
    }
    if (answer->taken < count || norm < 0) return memory;
    answer->are_apart = are_apart(table, count);
    int64_t entries = 0;
    for (int64_t i = 0; i < count; i++) {
        entries += table[i].entries;
        answer->is_wide |= table[i].kind == FLOAT64;
    }
    if (entries >= GRAIN) return memory;
    double *norms = (double *)python.content(arguments[4]);
    answer->is_read = gradkeel_read(table, count, (int32_t)norm, norms, NULL, NULL, NULL, team) == 0 ? 1 : -1;
    answer->total = gradkeel_total(norms, count, (int32_t)norm);
    return memory;
}

/* What tensors are, whatever they hold and wherever: for each of a Python list its dtype, device, alignment, shape and
 * strides in `words`; and its address, 0 for None. With `writes` the words are written, else compared with those there.
 *
 * Returns below zero where they do not fit into `length` words, differ, or cannot be exported (a Python exception is
 * then set), and addresses may be half new; else how many words there are, or whether any address is another than it
 * was. Needs the GIL.
 */
static int64_t locate(void *list, int64_t writes, int64_t *words, int64_t length, int64_t *addresses, const void *none) {
    int64_t next = 0, moved = 0;
    for (int64_t i = 0, count = python.length(list); i < count; i++) {
        struct dltensor t = {.ndim = -1};
        void *object = python.item(list, (intptr_t)i);
        if (object == NULL || (object != none && python.export(object, &t) != 0)) return -1;
        int64_t address = (int64_t)(intptr_t)t.data + (int64_t)t.byte_offset, dims = t.ndim < 0 ? 0 : t.ndim;
        int64_t head[] = {t.ndim, t.code | t.bits << 8 | (int64_t)t.lanes << 16, t.device_type, t.device_id, address & 15};
        int64_t width = (int64_t)(sizeof head / sizeof *head);
        if (next + width + 2 * dims > length) return -1;
        for (int64_t d = 0; d < width + 2 * dims; d++, next++) {
            int64_t word = d < width ? head[d] : d < width + dims ? t.shape[d - width] : t.strides[d - width - dims];
            if (writes)
                words[next] = word;
            else if (words[next] != word)
                return -1;
        }
        moved |= addresses[i] != address;
        addresses[i] = address;
    }
    return writes ? next : moved;
}

/* locate(list, writes, words, length, addresses, None): the same. */
EXPORT void *gradkeel_locate(void *self, void *const *arguments, intptr_t given) {
    (void)self, (void)given;
    void *list = arguments[0], *none = arguments[5];
    int64_t *words = pointer(arguments[2]), *addresses = pointer(arguments[4]), writes = python.whole(arguments[1]);
    int64_t found = python.error() ? -1 : locate(list, writes, words, python.whole(arguments[3]), addresses, none);
    return python.error() ? NULL : python.number(found);
}

/* scale(table, count, factors, team): gradkeel_scale by a list of one factor, or one for each tensor, in a call that
 * holds the GIL. Returns 0, or -1 without memory. */
EXPORT void *gradkeel_scale_few(void *self, void *const *arguments, intptr_t given) {
    (void)self, (void)given;
    const struct tensor *table = pointer(arguments[0]);
    const struct team *team = pointer(arguments[3]);
    int64_t count = python.whole(arguments[1]), factors = python.length(arguments[2]);
    double *factor = malloc(sizeof *factor * (size_t)(factors + 1));
    int32_t done = -1;
    for (int64_t i = 0; factor != NULL && i < factors; i++) factor[i] = python.real(python.item(arguments[2], i));
    int failed = python.error() != NULL;
    if (factor != NULL && !failed) done = gradkeel_scale(table, count, factor, factors == 1 ? OF_ALL : OF_TENSOR, team);
    free(factor);
    return failed ? NULL : python.number(done);
}

/* [cells] numbers as a list, neighbours that are equal as one object; NULL without memory. */
static void *listed(const double *numbers, int64_t cells) {
    void *list = python.list(cells), *number = NULL;
    for (int64_t i = 0; list != NULL && i < cells; i++) {
        if (i > 0 && numbers[i] == numbers[i - 1]) {
            python.hold(number);
        } else {
            number = python.float_of(numbers[i]);
        }
        if (number == NULL || python.put(list, i, number) != 0) {
            python.release(list);
            return NULL;
        }
    }
    return list;
}

/* follow(formula, cells, shared, norms, looks, l, after[, before[, rings, size]]): see `follow` above. `shared` is a list of
 * numbers; where there is one more than the formula takes, that is the norm of the only cell; else `norms` is an address,
 * or a bytearray of them. `after`, `before` (what was written the last time) and `rings` are bytearrays.
 *
 * Returns a list: the first two results, each a list of numbers. */
EXPORT void *gradkeel_follow(void *self, void *const *arguments, intptr_t given) {
    (void)self;
    const struct formula *f = pointer(arguments[0]);
    int64_t cells = python.whole(arguments[1]), l = python.whole(arguments[5]);
    int64_t size = given > 9 ? python.whole(arguments[9]) : 0;
    const double *norms = NULL, *looks = pointer(arguments[4]), *before = NULL;
    double *after = (double *)python.content(arguments[6]), *rings = NULL;
    if (python.length(arguments[2]) == f->shared) {
        int is_memory = python.is_of(arguments[3], python.type_of_memory) == 1;
        norms = is_memory ? (double *)python.content(arguments[3]) : pointer(arguments[3]);
    }
    if (given > 7) before = (double *)python.content(arguments[7]) + cells * (f->results - (f->own - 1 - l));
    if (given > 8) rings = (double *)python.content(arguments[8]);
    double shared[MOST_NUMBERS + 1];
    for (int64_t i = 0; i < f->shared + (norms == NULL); i++) shared[i] = python.real(python.item(arguments[2], i));
    if (python.error()) return NULL;
    if (norms == NULL) norms = shared + f->shared;
    if (follow(f, cells, shared, norms, looks, l, before, after, rings, size) != 0) return python.no_memory();
    void *both = python.list(2), *found[] = {listed(after, cells), listed(after + cells, cells)};
    for (int i = 0; i < 2; i++) {
        if (both != NULL && found[i] != NULL && python.put(both, i, found[i]) == 0) continue;
        if (both == NULL && found[i] != NULL) python.release(found[i]);
        if (both != NULL) python.release(both);
        both = NULL;
    }
    return both;
}
