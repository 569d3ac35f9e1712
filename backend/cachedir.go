package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// scarce is how little free space of a cache is worth a warning.
const scarce = 1 << 30

// CheckCacheDir says what is to be known of a directory that fetched bytes are to
// be kept in; where it has yet to be made, of the one that it will be in. It writes
// to a file there that has no name afterwards.
func CheckCacheDir(dir string) []Finding {
	for parent := filepath.Dir(dir); missing(dir) && parent != dir; parent = filepath.Dir(dir) {
		dir = parent
	}
	f := Finding{For: byPreference(), Status: OK}
	fail := func(err error) []Finding {
		f.Status, f.What, f.Do = Missing, fmt.Sprintf("cache directory: %v", err), "choose another with --cache-dir"
		return []Finding{f}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fail(pathError("statfs", dir, err))
	}
	sparse, err := keepsHoles(dir)
	if err != nil {
		return fail(err)
	}
	free := st.Bavail * uint64(st.Frsize)
	f.What = fmt.Sprintf("cache directory %s, %.1f GB free", dir, float64(free)/1e9)
	findings := []Finding{f}
	warn := func(what, do string) {
		findings = append(findings, Finding{For: f.For, Status: Warning, What: "cache directory: " + what, Do: do})
	}
	if free < scarce {
		warn("little space is free", "make room, or choose another with --cache-dir")
	}
	if !sparse {
		warn("its file system has no sparse files: each image takes its whole size at once", "choose one on ext4, xfs or btrfs with --cache-dir")
	}
	switch uint32(st.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		warn("it is in memory: what is fetched takes memory, and is gone after a reboot", "choose one on a disk with --cache-dir")
	case unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.V9FS_MAGIC,
		unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.AFS_FS_MAGIC, unix.FUSE_SUPER_MAGIC:
		warn("it is on a file system of the network, or of another program", "choose one on a local disk with --cache-dir")
	}
	return findings
}

func missing(dir string) bool {
	_, err := os.Lstat(dir)
	return errors.Is(err, fs.ErrNotExist)
}

// keepsHoles tells whether what was not written of a file takes no space.
func keepsHoles(dir string) (_ bool, err error) {
	f, err := os.CreateTemp(dir, ".erofs-oci-doctor-")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := os.Remove(f.Name()); err != nil {
		return false, err
	}
	const size = 16 << 20
	if _, err := f.WriteAt([]byte{1}, size-1); err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, err
	}
	// st_blocks counts units of 512 bytes, whatever the file system's are.
	return st.Blocks*512 < size/2, nil
}
