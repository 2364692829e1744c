/* Look-ups in a node's shared memory, from C or C++: one header, nothing to link, Linux on a little-endian processor; GCC or
 * Clang, -std=gnu11 or -D_POSIX_C_SOURCE=200809L.
 *
 * The layout is docs/reference/shared-memory-layout.md, version EKKO_LAYOUT_VERSION; a store of another version is refused.
 *
 *     ekko_reader reader;
 *     int error = ekko_open(&reader, "/var/lib/ekko/eu-1", "ctr", "item");
 *     if (!error) error = ekko_lookup(&reader, keys, count, rows, stamps);      rows: float[count * reader.dim]
 *     if (error) puts(ekko_message(error));
 *     ekko_close(&reader);
 *
 * Which requests the baseline answers, the model with delayed state, instead of the online model (docs/reference/health.md):
 *
 *     uint64_t id = ekko_request_id("request-1", 9);                  of an id that is text; one that is a number is itself
 *     uint8_t arm;
 *     error = ekko_arms(&reader, &id, 1, &arm);                       EKKO_ONLINE or EKKO_BASELINE
 *
 * A reader follows its node: a larger index, a new manifest, an alias that is switched, a store that was replaced. It is for one thread at a time; give
 * each thread its own, which costs some mappings and one row. Whoever inherits one over fork() may go on using it.
 *
 * Memory order. The words of the store are read with the compiler's __atomic functions, whose orders are those of C11: entries
 * of the index and locks of rows with acquire, everything inside a row relaxed, between the two looks at its lock, with an
 * acquire fence before the second. So no access here is a data race, and none depends on the processor being an x86-64.
 */
#ifndef EKKO_H
#define EKKO_H

#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ekko.h reads the store in place: the processor must be little-endian"
#endif

#define EKKO_LAYOUT_VERSION 3

enum {
    EKKO_OK = 0,
    EKKO_NO_STORE = 1,    /* run_dir has no manifest of this boot of the machine: the node has not begun */
    EKKO_NO_MODEL = 2,    /* the node has no such model, or not the one that this alias stands for */
    EKKO_NO_TABLE = 3,    /* the model has no such table */
    EKKO_VERSION = 4,     /* shared memory of another layout: install the same version on both sides */
    EKKO_DAMAGED = 5,     /* a file makes no sense */
    EKKO_SYSTEM = 6,      /* a call of the system failed; errno says why */
    EKKO_LOCKED = 7,      /* a row stays locked: its node was killed in mid-row; start it again, and it repairs the row */
    EKKO_CHANGED = 8,     /* another dim than before: make room for reader->dim values a row, and look up again */
    EKKO_PARTIAL = 9,     /* the node holds a part of the model only: absent and not held could not be told apart */
    EKKO_UNSTABLE = 10    /* slots or files change hands faster than they can be followed */
};

enum { EKKO_ONLINE = 0, EKKO_BASELINE = 1 }; /* which arm answers a request */

static inline const char *ekko_message(int error) {
    static const char *const messages[] = {
        "no error", "no node has a store in this run_dir", "the node does not have this model",
        "the model does not have this table", "shared memory of another version of ekko", "shared memory is damaged",
        "a system call failed", "a row stays locked: its node was killed, start it again", "the table has another dim now",
        "the node holds a part of this model only", "the store changes faster than it can be followed"};
    return error >= 0 && error <= EKKO_UNSTABLE ? messages[error] : "unknown error";
}

typedef struct {
    const uint8_t *begin; /* NULL: nothing is mapped */
    size_t size;
} ekko_mapping;

typedef struct {
    uint32_t dim; /* values of a row */
    /* The rest is the header's own. */
    char *run_dir, *model, *table, *prefix; /* prefix: path of the store's files up to their names */
    ekko_mapping control, header, rows, index;
    uint64_t manifest_generation, index_generation, row_bytes, stride, codec;
    uint32_t model_id, table_id;
    unsigned capacity_log2;
    int64_t ttl_ms;  /* rows older than this are absent; 0: rows do not expire */
    uint64_t *copy;  /* one row */
    uint64_t salt;   /* of the model's requests */
} ekko_reader;

/* --- words of the store ------------------------------------------------------------------------------------------------- */

static inline uint64_t ekko_acquire_(const uint8_t *word) { return __atomic_load_n((const uint64_t *)(const void *)word, __ATOMIC_ACQUIRE); }
static inline uint64_t ekko_relaxed_(const uint8_t *word) { return __atomic_load_n((const uint64_t *)(const void *)word, __ATOMIC_RELAXED); }

static inline uint64_t ekko_mix64(uint64_t key) {
    key ^= key >> 33;
    key *= 0xFF51AFD7ED558CCDull;
    key ^= key >> 33;
    key *= 0xC4CEB9FE1A85EC53ull;
    return key ^ key >> 33;
}

/* xxh32 with seed 0: the id of a model or of a table. */
static inline uint32_t ekko_id(const char *name) {
    const uint32_t p1 = 2654435761u, p2 = 2246822519u, p3 = 3266489917u, p4 = 668265263u, p5 = 374761393u;
    const uint8_t *at = (const uint8_t *)name;
    size_t left = strlen(name);
    uint32_t hash = (uint32_t)left, word;
#define EKKO_ROTATE_(value, bits) ((value) << (bits) | (value) >> (32 - (bits)))
    if (left >= 16) {
        uint32_t lanes[4] = {p1 + p2, p2, 0, 0u - p1};
        for (; left >= 16; left -= 16)
            for (int lane = 0; lane < 4; lane++, at += 4) {
                memcpy(&word, at, 4);
                lanes[lane] += word * p2;
                lanes[lane] = EKKO_ROTATE_(lanes[lane], 13) * p1;
            }
        hash += EKKO_ROTATE_(lanes[0], 1) + EKKO_ROTATE_(lanes[1], 7) + EKKO_ROTATE_(lanes[2], 12) + EKKO_ROTATE_(lanes[3], 18);
    } else {
        hash += p5;
    }
    for (; left >= 4; left -= 4, at += 4) {
        memcpy(&word, at, 4);
        hash += word * p3;
        hash = EKKO_ROTATE_(hash, 17) * p4;
    }
    for (; left; left--, at++) {
        hash += *at * p5;
        hash = EKKO_ROTATE_(hash, 11) * p1;
    }
#undef EKKO_ROTATE_
    hash = (hash ^ hash >> 15) * p2;
    hash = (hash ^ hash >> 13) * p3;
    return hash ^ hash >> 16;
}

static inline uint64_t ekko_rotate64_(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

/* xxh64 with seed 0: the id of a request whose id is text or bytes, and what is mixed into those of a model. */
static inline uint64_t ekko_request_id(const void *text, size_t bytes) {
    const uint64_t p1 = 0x9E3779B185EBCA87ull, p2 = 0xC2B2AE3D27D4EB4Full, p3 = 0x165667B19E3779F9ull;
    const uint64_t p4 = 0x85EBCA77C2B2AE63ull, p5 = 0x27D4EB2F165667C5ull;
    const uint8_t *at = (const uint8_t *)text;
    size_t left = bytes;
    uint64_t hash = p5, word;
    uint32_t half;
    if (left >= 32) {
        uint64_t lanes[4] = {p1 + p2, p2, 0, 0u - p1};
        for (; left >= 32; left -= 32)
            for (int lane = 0; lane < 4; lane++, at += 8) {
                memcpy(&word, at, 8);
                lanes[lane] = ekko_rotate64_(lanes[lane] + word * p2, 31) * p1;
            }
        hash = ekko_rotate64_(lanes[0], 1) + ekko_rotate64_(lanes[1], 7) + ekko_rotate64_(lanes[2], 12) +
               ekko_rotate64_(lanes[3], 18);
        for (int lane = 0; lane < 4; lane++) hash = (hash ^ ekko_rotate64_(lanes[lane] * p2, 31) * p1) * p1 + p4;
    }
    hash += bytes;
    for (; left >= 8; left -= 8, at += 8) {
        memcpy(&word, at, 8);
        hash = ekko_rotate64_(hash ^ ekko_rotate64_(word * p2, 31) * p1, 27) * p1 + p4;
    }
    if (left >= 4) {
        memcpy(&half, at, 4);
        hash = ekko_rotate64_(hash ^ half * p1, 23) * p2 + p3;
        left -= 4, at += 4;
    }
    for (; left; left--, at++) hash = ekko_rotate64_(hash ^ *at * p5, 11) * p1;
    hash = (hash ^ hash >> 33) * p2;
    hash = (hash ^ hash >> 29) * p3;
    return hash ^ hash >> 32;
}

/* --- the manifest: as much JSON as it takes ----------------------------------------------------------------------------- */

static inline const char *ekko_blank_(const char *at) { return at + strspn(at, " \t\r\n"); }

/* The first character after the string, number, word, object or array that begins here; NULL: it does not end. */
static inline const char *ekko_skip_(const char *at) {
    int depth = 0;
    at = ekko_blank_(at);
    do {
        if (*at == '"') {
            for (at++; *at != '"'; at++)
                if (!*at || (*at == '\\' && !*++at)) return NULL;
            at++;
        } else if (*at == '{' || *at == '[') {
            depth++, at++;
        } else if (*at == '}' || *at == ']') {
            depth--, at++;
        } else if (depth && (*at == ',' || *at == ':')) {
            at++;
        } else {
            size_t length = strcspn(at, ",:{}[]\" \t\r\n");
            if (!length) return NULL;
            at += length;
        }
        if (depth) at = ekko_blank_(at);
    } while (depth > 0);
    return depth ? NULL : at;
}

/* The value of a key of the object that begins here; NULL: there is none. */
static inline const char *ekko_member_(const char *object, const char *key) {
    const char *at = object ? ekko_blank_(object) : NULL, *end;
    size_t length = strlen(key);
    if (!at || *at != '{') return NULL;
    for (at = ekko_blank_(at + 1); *at == '"'; at = ekko_blank_(at + 1)) {
        const char *name = at + 1, *value;
        if (!(end = ekko_skip_(at))) return NULL;
        value = ekko_blank_(end);
        if (*value != ':') return NULL;
        value = ekko_blank_(value + 1);
        if ((size_t)(end - 1 - name) == length && !memcmp(name, key, length)) return value;
        if (!(at = ekko_skip_(value))) return NULL;
        at = ekko_blank_(at);
        if (*at != ',') return NULL;
    }
    return NULL;
}

/* A copy of the string that begins here, to be freed; NULL: it is none, or has characters that JSON escapes. */
static inline char *ekko_string_(const char *at) {
    const char *end = at && *at == '"' ? ekko_skip_(at) : NULL;
    size_t length = end ? (size_t)(end - at) - 2 : 0;
    char *copy;
    if (!end || memchr(at, '\\', length + 1) || !(copy = (char *)malloc(length + 1))) return NULL;
    memcpy(copy, at + 1, length);
    copy[length] = 0;
    return copy;
}

static inline int ekko_is_(const char *at, const char *text) {
    size_t length = strlen(text);
    return at && *at == '"' && !strncmp(at + 1, text, length) && at[length + 1] == '"';
}

/* Of an array of objects the one that is called so; NULL: there is none. */
static inline const char *ekko_named_(const char *array, const char *name) {
    const char *at = array ? ekko_blank_(array) : NULL;
    if (!at || *at != '[') return NULL;
    for (at = ekko_blank_(at + 1); *at == '{'; at = ekko_blank_(at + 1)) {
        if (ekko_is_(ekko_member_(at, "name"), name)) return at;
        if (!(at = ekko_skip_(at))) return NULL;
        at = ekko_blank_(at);
        if (*at != ',') return NULL;
    }
    return NULL;
}

/* The element of an array with this number; NULL: there is none. */
static inline const char *ekko_item_(const char *array, int number) {
    const char *at = array ? ekko_blank_(array) : NULL;
    if (!at || *at != '[') return NULL;
    for (at = ekko_blank_(at + 1); *at && *at != ']'; at = ekko_blank_(at + 1)) {
        if (!number--) return at;
        if (!(at = ekko_skip_(at))) return NULL;
        at = ekko_blank_(at);
        if (*at != ',') return NULL;
    }
    return NULL;
}

static inline uint64_t ekko_number_(const char *at) { return at ? strtoull(at, NULL, 10) : 0; }

/* --- aliases: which model a name stands for ------------------------------------------------------------------------------- */

typedef struct {
    char name[101]; /* empty: none */
    uint64_t incarnation;
} ekko_generation_;

/* Of an array of arrays the one that begins with this name; NULL: there is none. */
static inline const char *ekko_fact_(const char *facts, const char *name) {
    const char *fact;
    for (int number = 0; (fact = ekko_item_(facts, number)); number++)
        if (ekko_is_(ekko_item_(fact, 0), name)) return fact;
    return NULL;
}

/* A name and an incarnation, as an array of two. */
static inline ekko_generation_ ekko_generation_of_(const char *pair) {
    ekko_generation_ generation = {"", ekko_number_(ekko_item_(pair, 1))};
    char *name = ekko_string_(ekko_item_(pair, 0));
    if (name && strlen(name) < sizeof generation.name) strcpy(generation.name, name);
    free(name);
    return generation;
}

static inline int ekko_is_dropped_(const char *registers, const ekko_generation_ *generation) {
    const char *fact = ekko_fact_(ekko_member_(registers, "dropped"), generation->name);
    return fact && generation->incarnation <= ekko_number_(ekko_item_(fact, 1));
}

/* What a name stands for, when switches up to `unix_ms` count (0: all do): 0 when it is no alias. An alias is its name, what it
 * stands for, what it stood for before, and from when on. Of what is dropped the other one is left. */
static inline int ekko_resolve_(const char *registers, const char *name, uint64_t unix_ms, ekko_generation_ *found) {
    const char *alias = ekko_fact_(ekko_member_(registers, "alias"), name);
    ekko_generation_ target, previous;
    int ahead;
    if (!alias) return 0;
    target = ekko_generation_of_(ekko_item_(alias, 1));
    previous = ekko_generation_of_(ekko_item_(alias, 2));
    ahead = unix_ms && unix_ms < ekko_number_(ekko_item_(alias, 3)) && *previous.name;
    *found = ahead ? previous : target;
    if (!*target.name) return ahead; /* it was removed, or is about to be */
    if (ekko_is_dropped_(registers, found)) {
        *found = ahead ? target : previous;
        if (!*found->name || ekko_is_dropped_(registers, found)) *found = target;
    }
    return 1;
}

/* --- files -------------------------------------------------------------------------------------------------------------- */

/* A whole small file as text, to be freed; NULL: it cannot be read. */
static inline char *ekko_text_(const char *path) {
    FILE *file = fopen(path, "re");
    char *text = NULL;
    size_t size = 0, room = 0;
    if (!file) return NULL;
    do {
        char *larger = (char *)realloc(text, room = room ? 2 * room : 4096);
        if (!larger) {
            free(text);
            fclose(file);
            return NULL;
        }
        text = larger;
        size += fread(text + size, 1, room - 1 - size, file);
    } while (size == room - 1);
    text[size] = 0;
    fclose(file);
    return text;
}

static inline void ekko_unmap_(ekko_mapping *mapping) {
    if (mapping->begin) munmap((void *)(uintptr_t)mapping->begin, mapping->size);
    mapping->begin = NULL;
}

/* Map PREFIX-NAME read-only, and look at its first words. -1: it is not there. */
static inline int ekko_map_(const char *prefix, const char *name, const char *magic, size_t header, ekko_mapping *mapping) {
    char path[4096], expected[8] = {0};
    struct stat status;
    void *begin;
    int length = snprintf(path, sizeof path, "%s-%s", prefix, name), file;
    if (length < 0 || (size_t)length >= sizeof path) return EKKO_DAMAGED;
    if ((file = open(path, O_RDONLY | O_CLOEXEC)) < 0) return access(path, F_OK) ? -1 : EKKO_SYSTEM;
    if (fstat(file, &status) || (size_t)status.st_size < header) {
        close(file);
        return EKKO_DAMAGED;
    }
    begin = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (begin == MAP_FAILED) return EKKO_SYSTEM;
    mapping->begin = (const uint8_t *)begin;
    mapping->size = (size_t)status.st_size;
    memcpy(expected, magic, strlen(magic));
    if (memcmp(mapping->begin, expected, 8)) return EKKO_DAMAGED;
    return ekko_relaxed_(mapping->begin + 8) == EKKO_LAYOUT_VERSION ? EKKO_OK : EKKO_VERSION;
}

static inline int ekko_map_index_(ekko_reader *reader) {
    char name[64];
    for (int attempt = 0; attempt < 100; attempt++) {
        int error;
        reader->index_generation = ekko_acquire_(reader->rows.begin + 128);
        ekko_unmap_(&reader->index);
        snprintf(name, sizeof name, "%08x-%08x-index-%llu", (unsigned)reader->model_id, (unsigned)reader->table_id,
                 (unsigned long long)reader->index_generation);
        error = ekko_map_(reader->prefix, name, "ekkoindx", 4096, &reader->index);
        if (error < 0) {
            if (reader->index_generation == ekko_acquire_(reader->rows.begin + 128)) return -1;
            continue; /* replaced meanwhile */
        }
        if (error) return error;
        reader->capacity_log2 = (unsigned)ekko_relaxed_(reader->index.begin + 24);
        if (reader->capacity_log2 < 1 || reader->capacity_log2 > 48 ||
            reader->index.size < 4096 + ((size_t)8 << reader->capacity_log2))
            return EKKO_DAMAGED;
        return EKKO_OK;
    }
    return EKKO_UNSTABLE;
}

static inline void ekko_detach_(ekko_reader *reader) {
    ekko_unmap_(&reader->control);
    ekko_unmap_(&reader->header);
    ekko_unmap_(&reader->rows);
    ekko_unmap_(&reader->index);
    free(reader->prefix);
    free(reader->copy);
    reader->prefix = NULL;
    reader->copy = NULL;
}

/* The id of a model or table, of which there was another one with this name before. */
static inline uint32_t ekko_id_of_(const char *name, uint64_t incarnation) {
    char label[160]; /* a name has 100 characters at most */
    if (!incarnation) return ekko_id(name);
    snprintf(label, sizeof label, "%s#%llu", name, (unsigned long long)incarnation);
    return ekko_id(label);
}

/* Understand which model and table a manifest says that we are to read. `unix_ms`: which switches of aliases count. */
static inline int ekko_understand_(ekko_reader *reader, const char *manifest, uint64_t unix_ms) {
    const char *model, *hold, *table, *dim, *name = reader->model;
    ekko_generation_ meant;
    int aliased = ekko_resolve_(ekko_member_(manifest, "registers"), name, unix_ms, &meant);
    uint64_t incarnation;
    if (aliased) name = meant.name;
    if (!(model = ekko_named_(ekko_member_(manifest, "models"), name))) return EKKO_NO_MODEL;
    incarnation = ekko_number_(ekko_member_(model, "incarnation"));
    if (aliased && incarnation != meant.incarnation) return EKKO_NO_MODEL;
    if (!(table = ekko_named_(ekko_member_(model, "tables"), reader->table))) return EKKO_NO_TABLE;
    if ((hold = ekko_member_(model, "hold")) && *hold != 'n') return EKKO_PARTIAL;
    if (!(dim = ekko_member_(table, "dim"))) return EKKO_DAMAGED;
    reader->model_id = ekko_id_of_(name, incarnation);
    reader->salt = ekko_request_id(name, strlen(name));
    reader->table_id = ekko_id_of_(reader->table, ekko_number_(ekko_member_(table, "incarnation")));
    reader->dim = (uint32_t)ekko_number_(dim);
    reader->ttl_ms = (int64_t)ekko_number_(ekko_member_(table, "ttl_s")) * 1000;
    return EKKO_OK;
}

/* Where a manifest says that the store is: the path of its files up to their names. */
static inline int ekko_locate_(const char *manifest, char **prefix) {
    const char *version = ekko_member_(manifest, "layout_version");
    char *directory = ekko_string_(ekko_member_(manifest, "memory_dir")), *stem = ekko_string_(ekko_member_(manifest, "prefix"));
    int error = EKKO_DAMAGED;
    *prefix = NULL;
    if (version && strtol(version, NULL, 10) != EKKO_LAYOUT_VERSION) {
        error = EKKO_VERSION;
    } else if (version && directory && stem && (*prefix = (char *)malloc(strlen(directory) + strlen(stem) + 2))) {
        sprintf(*prefix, "%s/%s", directory, stem);
        error = EKKO_OK;
    }
    free(directory);
    free(stem);
    return error;
}

/* Where the store is and, once its control file is mapped, what we are to read there. */
static inline int ekko_read_manifest_(ekko_reader *reader, char **prefix) {
    char path[4096], *manifest, *boot = NULL, *named = NULL;
    int length = snprintf(path, sizeof path, "%s/manifest.json", reader->run_dir), error = EKKO_NO_STORE;
    if (length < 0 || (size_t)length >= sizeof path || !(manifest = ekko_text_(path))) return EKKO_NO_STORE;
    boot = ekko_text_("/proc/sys/kernel/random/boot_id");
    named = ekko_string_(ekko_member_(manifest, "boot_id"));
    if (boot) boot[strcspn(boot, "\n")] = 0;
    if (boot && named && !strcmp(boot, named)) error = ekko_locate_(manifest, prefix); /* else: memory that is gone */
    if (!error && reader->control.begin) error = ekko_understand_(reader, manifest, ekko_acquire_(reader->control.begin + 80));
    free(named);
    free(boot);
    free(manifest);
    return error;
}

static inline int ekko_check_rows_(ekko_reader *reader) {
    static const unsigned value_bytes[] = {4, 2, 2, 1};
    const uint8_t *header = reader->rows.begin;
    uint64_t encoded;
    reader->row_bytes = ekko_relaxed_(header + 24);
    reader->stride = ekko_relaxed_(header + 32);
    reader->codec = ekko_relaxed_(header + 40);
    if (ekko_relaxed_(header + 16) != reader->table_id || reader->codec > 3) return EKKO_DAMAGED;
    encoded = (uint64_t)reader->dim * value_bytes[reader->codec];
    if (reader->codec == 3) encoded = 4 + ((encoded + 3) & ~(uint64_t)3);
    if (encoded != reader->row_bytes || reader->stride != 24 + ((encoded + 7) & ~(uint64_t)7)) return EKKO_DAMAGED;
    return (reader->copy = (uint64_t *)malloc(reader->stride)) ? EKKO_OK : EKKO_SYSTEM;
}

/* Attach to what the manifest names now. */
static inline int ekko_attach_(ekko_reader *reader) {
    for (int attempt = 0; attempt < 100; attempt++) {
        char name[64], *again = NULL;
        int error, replaced;
        ekko_detach_(reader);
        if ((error = ekko_read_manifest_(reader, &reader->prefix))) return error;
        error = ekko_map_(reader->prefix, "control", "ekkoctl", 4096, &reader->control);
        if (error < 0) continue; /* replaced under our hands */
        if (error) return error;
        reader->manifest_generation = ekko_acquire_(reader->control.begin + 64);
        /* Again: this manifest is at least as new as the generation. */
        error = ekko_read_manifest_(reader, &again);
        replaced = again && strcmp(again, reader->prefix);
        free(again);
        if (replaced) continue;
        if (error) return error;
        snprintf(name, sizeof name, "%08x-header", (unsigned)reader->model_id);
        error = ekko_map_(reader->prefix, name, "ekkomodl", 4096, &reader->header);
        if (error < 0) continue;
        if (error) return error;
        snprintf(name, sizeof name, "%08x-%08x-rows", (unsigned)reader->model_id, (unsigned)reader->table_id);
        error = ekko_map_(reader->prefix, name, "ekkotabl", 4096, &reader->rows);
        if (!error) error = ekko_check_rows_(reader);
        if (!error) error = ekko_map_index_(reader);
        if (error >= 0) return error;
    }
    return EKKO_UNSTABLE;
}

/* Let go of everything. Safe to call twice, and after an ekko_open that failed. */
static inline void ekko_close(ekko_reader *reader) {
    ekko_detach_(reader);
    free(reader->run_dir);
    free(reader->model);
    free(reader->table);
    reader->run_dir = reader->model = reader->table = NULL;
}

/* Attach to a table of a model of the node with this run_dir. `model` may be an alias: then the reader follows it from model to
 * model, between two look-ups; should the next one's table have another dim, ekko_lookup says EKKO_CHANGED. */
static inline int ekko_open(ekko_reader *reader, const char *run_dir, const char *model, const char *table) {
    int error;
    memset(reader, 0, sizeof *reader);
    reader->run_dir = strdup(run_dir);
    reader->model = strdup(model);
    reader->table = strdup(table);
    error = reader->run_dir && reader->model && reader->table ? ekko_attach_(reader) : EKKO_SYSTEM;
    if (error) ekko_close(reader);
    return error;
}

/* --- rows --------------------------------------------------------------------------------------------------------------- */

static inline float ekko_float_(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float ekko_half_(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 1023u;
    if (!exponent) return copysignf((float)fraction * 0x1p-24f, ekko_float_(sign | 0x3F800000u)); /* zero, and below 2^-14 */
    /* A node stores no infinity and no NaN, so the largest exponent is one like the others, as for ekko.Reader. */
    return ekko_float_(sign | (exponent + 112) << 23 | fraction << 13);
}

/* Decode the copied row. */
static inline void ekko_decode_(const ekko_reader *reader, float *out) {
    const uint8_t *data = (const uint8_t *)(reader->copy + 3);
    uint16_t half;
    float scale;
    switch (reader->codec) {
    case 0:
        memcpy(out, data, (size_t)reader->dim * 4);
        return;
    case 3:
        memcpy(&scale, data, 4);
        for (uint32_t i = 0; i < reader->dim; i++) out[i] = (float)(int8_t)data[4 + i] * scale;
        return;
    default:
        for (uint32_t i = 0; i < reader->dim; i++) {
            memcpy(&half, data + 2 * (size_t)i, 2);
            out[i] = reader->codec == 1 ? ekko_half_(half) : ekko_float_((uint32_t)half << 16);
        }
    }
}

/* Copy the slot's row between two looks at its lock. */
static inline int ekko_copy_(ekko_reader *reader, int64_t slot) {
    const uint8_t *row;
    struct timespec last = {0, 0}, now;
    int64_t waited = 0, gap; /* nanoseconds */
    if ((uint64_t)slot >= (reader->rows.size - 4096) / reader->stride) return EKKO_DAMAGED;
    row = reader->rows.begin + 4096 + (uint64_t)slot * reader->stride;
    for (unsigned spins = 1;; spins++) {
        const uint32_t *lock = (const uint32_t *)(const void *)row;
        uint32_t before = __atomic_load_n(lock, __ATOMIC_ACQUIRE);
        if (!(before & 1)) {
            for (uint64_t word = 0; word < reader->stride / 8; word++) reader->copy[word] = ekko_relaxed_(row + 8 * word);
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if (__atomic_load_n(lock, __ATOMIC_RELAXED) == before) return EKKO_OK;
        }
        if (spins % 4096 == 0) { /* far longer than a row takes: let its writer have the processor, for a second of looking */
            clock_gettime(CLOCK_MONOTONIC, &now);
            gap = !last.tv_sec ? 0 : (now.tv_sec - last.tv_sec) * 1000000000 + (now.tv_nsec - last.tv_nsec);
            /* If more has gone by, we stood still ourselves, perhaps with the whole machine, and so did the writer. */
            waited += gap > 10000000 ? 10000000 : gap;
            if (waited > 1000000000) return EKKO_LOCKED;
            last = now;
            sched_yield();
        }
    }
}

/* What an entry of the index says of its key, above the slot. */
static inline uint64_t ekko_tag_(uint64_t key) { return (ekko_mix64(key) & 0x7FFFFFFFu) | 0x80000000u; }

/* One key in the index that is mapped: 1 and its row in reader->copy, 0 when it is not there, 2 when a slot changed hands after
 * its entry was read, or minus an error. */
static inline int ekko_search_(ekko_reader *reader, uint64_t key, uint64_t stamp_min) {
    const uint64_t mask = ((uint64_t)1 << reader->capacity_log2) - 1, tag = ekko_tag_(key);
    uint64_t place = ekko_mix64(key) >> (64 - reader->capacity_log2);
    int moved = 0, error;
    for (uint64_t looked = 0; looked <= mask; looked++, place = (place + 1) & mask) {
        /* Once: the entry may be given to another key at any time. */
        uint64_t entry = ekko_acquire_(reader->index.begin + 4096 + 8 * place);
        uint32_t flags;
        if (!entry) break;
        if (entry >> 32 != tag) continue;
        if ((error = ekko_copy_(reader, (int64_t)(entry & 0xFFFFFFFFu)))) return -error;
        flags = (uint32_t)(reader->copy[0] >> 32);
        if (flags & 2) continue; /* free: its key was absent when we looked */
        if (reader->copy[2] == key) return !(flags & 1) && reader->copy[1] >= stamp_min;
        moved |= ekko_tag_(reader->copy[2]) != tag; /* else: another key has the same tag, and ours may come behind it */
    }
    return 2 * moved;
}

/* One key: 1 and its row in reader->copy, 0 when it is absent, or minus an error. */
static inline int ekko_fetch_(ekko_reader *reader, uint64_t key, uint64_t stamp_min) {
    for (int attempt = 0; attempt < 1000; attempt++) {
        int found = ekko_search_(reader, key, stamp_min), error;
        if (found < 0 || found == 1) return found;
        if (ekko_acquire_(reader->rows.begin + 128) != reader->index_generation) { /* what was not found may be in the new one */
            if ((error = ekko_map_index_(reader))) return -(error < 0 ? EKKO_UNSTABLE : error);
        } else if (!found) {
            return 0;
        }
    }
    return -EKKO_UNSTABLE;
}

/* Attach anew where the node has something new to say. After an error the next call tries again. */
static inline int ekko_follow_(ekko_reader *reader) {
    uint32_t dim = reader->dim;
    int error;
    if (reader->control.begin && ekko_acquire_(reader->control.begin + 64) == reader->manifest_generation &&
        !ekko_acquire_(reader->control.begin + 72))
        return EKKO_OK;
    if (!reader->run_dir) return EKKO_NO_STORE; /* closed */
    if ((error = ekko_attach_(reader))) {
        ekko_detach_(reader);
        return error;
    }
    return dim == reader->dim ? EKKO_OK : EKKO_CHANGED;
}

/* Which of these requests the online model answers, and which the baseline: uint8[count], EKKO_ONLINE or EKKO_BASELINE, the same
 * as ekko.Reader.arm says, in every process. An id is the integer itself, or ekko_request_id of a text. Should the table have
 * another dim than at the call before, it says EKKO_CHANGED, as ekko_lookup would; ask again. */
static inline int ekko_arms(ekko_reader *reader, const uint64_t *ids, size_t count, uint8_t *arms) {
    uint64_t from, until;
    int error = ekko_follow_(reader);
    if (error) return error;
    from = ekko_relaxed_(reader->header.begin + 384);
    until = ekko_relaxed_(reader->header.begin + 392);
    for (size_t i = 0; i < count; i++) {
        uint64_t upper = ekko_mix64(ids[i] ^ reader->salt) >> 32;
        arms[i] = until && (upper < from || upper >= until) ? EKKO_BASELINE : EKKO_ONLINE;
    }
    return EKKO_OK;
}

/* Copy rows out by key: float[count * reader->dim], zeros for keys that are absent or deleted; and, unless NULL, their stamps,
 * 0 for such keys. After an error `out` holds nothing of use. */
static inline int ekko_lookup(ekko_reader *reader, const uint64_t *keys, size_t count, float *out, uint64_t *stamps) {
    uint64_t stamp_min = 0;
    int error = ekko_follow_(reader);
    if (error) return error;
    if (ekko_acquire_(reader->rows.begin + 128) != reader->index_generation && (error = ekko_map_index_(reader)))
        return error < 0 ? EKKO_UNSTABLE : error;
    if (reader->ttl_ms) { /* a stamp begins with 42 bits of milliseconds since 2020 */
        struct timespec now;
        int64_t since;
        clock_gettime(CLOCK_REALTIME, &now);
        since = ((int64_t)now.tv_sec - 1577836800) * 1000 + now.tv_nsec / 1000000 - reader->ttl_ms;
        stamp_min = since > 0 ? (uint64_t)since << 22 : 0;
    }
    for (size_t i = 0; i < count; i++, out += reader->dim) {
        int found = ekko_fetch_(reader, keys[i], stamp_min);
        if (found < 0) return -found;
        if (found) ekko_decode_(reader, out);
        else memset(out, 0, (size_t)reader->dim * 4);
        if (stamps) stamps[i] = found ? reader->copy[1] : 0;
    }
    return EKKO_OK;
}

#endif
