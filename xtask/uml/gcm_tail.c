
/* What the processor says of itself: Intel's manual, volume 2, CPUID leaves 1 and 7. */
struct host_features {
	u32 leaf1_ecx, leaf7_ebx, leaf7_ecx;
	u64 saved_state;	/* XCR0: registers that the host's kernel saves */
};

#define HAS(word, bit) (!!((word) & (1u << (bit))))
#define STATE_AVX 0x06		/* SSE, YMM */
#define STATE_AVX512 0xe6	/* and the mask registers, both halves of ZMM */

static void __init cpuid_of(u32 leaf, u32 *ebx, u32 *ecx)
{
	u32 eax = leaf, edx;

	*ecx = 0;
	asm volatile("cpuid" : "+a" (eax), "=b" (*ebx), "+c" (*ecx), "=d" (edx));
}

static void __init ask_processor(struct host_features *host)
{
	u32 unused, low, high;

	cpuid_of(1, &unused, &host->leaf1_ecx);
	cpuid_of(7, &host->leaf7_ebx, &host->leaf7_ecx);
	host->saved_state = 0;
	if (HAS(host->leaf1_ecx, 27)) {
		asm volatile("xgetbv" : "=a" (low), "=d" (high) : "c" (0));
		host->saved_state = low | ((u64)high << 32);
	}
}

static int __init host_gcm_init(void)
{
	struct host_features host;
	bool aes, avx, vaes, avx512;
	int err = 0;

	ask_processor(&host);
	aes = HAS(host.leaf1_ecx, 25) && HAS(host.leaf1_ecx, 1);
	avx = aes && HAS(host.leaf1_ecx, 28) && (host.saved_state & STATE_AVX) == STATE_AVX;
	vaes = avx && HAS(host.leaf7_ecx, 9) && HAS(host.leaf7_ecx, 10) && HAS(host.leaf7_ebx, 5);
	avx512 = vaes && HAS(host.leaf7_ebx, 30) && HAS(host.leaf7_ebx, 31) && HAS(host.leaf7_ebx, 8) &&
		 (host.saved_state & STATE_AVX512) == STATE_AVX512;

	if (avx)
		err = crypto_register_aeads(aes_gcm_algs_aesni_avx, ARRAY_SIZE(aes_gcm_algs_aesni_avx));
	if (!err && vaes)
		err = crypto_register_aeads(aes_gcm_algs_vaes_avx2, ARRAY_SIZE(aes_gcm_algs_vaes_avx2));
	if (!err && avx512)
		err = crypto_register_aeads(aes_gcm_algs_vaes_avx512, ARRAY_SIZE(aes_gcm_algs_vaes_avx512));
	return err;
}
module_init(host_gcm_init);

MODULE_DESCRIPTION("AES-GCM with the processor's own instructions, for user-mode Linux");
MODULE_LICENSE("GPL");
