// Takes the place of OpenMP's header where the compiler has no OpenMP: setup.py then adds this folder to the include
// path. The compiler ignores OpenMP's pragmas, so every parallel region runs on one thread.
#pragma once

inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_max_threads() { return 1; }
inline int omp_get_num_procs() { return 1; }
