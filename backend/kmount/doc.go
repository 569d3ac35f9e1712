// Package kmount mounts EROFS images with the kernel's own EROFS: on a block
// device, on a regular file where the kernel can (Linux 6.12 with
// CONFIG_EROFS_FS_BACKED_BY_FILE), else on a file through a loop device.
//
//	Mount        device or file ── mount(2) ──────────────→ target
//	MountFile    file ── mount(2), and where that is refused
//	MountByLoop  file ── loop device ── mount(2) ─────────→ target
//
// It knows system calls and nothing else: neither where the bytes come from nor
// who records and unmounts the mount. Every mount is read-only.
package kmount
