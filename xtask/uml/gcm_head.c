// SPDX-License-Identifier: GPL-2.0
/*
 * AES-GCM with the processor's own instructions, for user-mode Linux.
 *
 * The x86 driver is built for x86 only, which user-mode Linux is not, though it runs on the same processor. Between this
 * head and gcm_tail.c the build puts that driver's own text, from the tree that is being built: from the key structures to
 * the last table of algorithms. User-mode Linux keeps the kernel's vector registers apart from its processes' by running
 * these as other processes, so kernel_fpu_begin() has nothing to do here.
 */
#include <linux/err.h>
#include <linux/hardirq.h>
#include <linux/module.h>
#include <linux/types.h>
#include <asm/fpu/api.h>
#include <asm/simd.h>
#include <crypto/aes.h>
#include <crypto/algapi.h>
#include <crypto/b128ops.h>
#include <crypto/gcm.h>
#include <crypto/gf128mul.h>
#include <crypto/internal/aead.h>
#include <crypto/internal/simd.h>
#include <crypto/internal/skcipher.h>
#include <crypto/scatterwalk.h>

