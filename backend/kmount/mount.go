package kmount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// FSType is the type of every mount of this package, as /proc/mounts shows it.
const FSType = "erofs"

// Options of a mount. The zero value mounts read-only with the defaults of
// mount(2).
type Options struct {
	// Flags are MS_* bits beside MS_RDONLY, which is always set.
	Flags uintptr
	// Devices are the extra devices of the image's device table, in its order:
	// block devices, or files where the image itself is mounted from a file.
	Devices []string
	// Sizes are how many bytes there are in the image's file and in those of
	// Devices, where that is not what the files say. A loop device ends there.
	Sizes []int64
}

// data is what mount(2) passes to the file system: a device= option for each
// device (fs/erofs/super.c erofs_fs_parse_param).
func (o Options) data() (string, error) {
	var words []string
	for _, d := range o.Devices {
		if strings.ContainsRune(d, ',') {
			return "", fmt.Errorf("device %q: a comma cannot be said in a mount option", d)
		}
		words = append(words, "device="+d)
	}
	data := strings.Join(words, ",")
	// copy_mount_options takes one page, and cuts off what is longer.
	if most := os.Getpagesize(); len(data) >= most {
		return "", fmt.Errorf("%d devices: their mount options take %d bytes, and mount(2) takes %d", len(o.Devices), len(data), most-1)
	}
	return data, nil
}

// Mount mounts the image on source, a block device or a regular file, on the
// directory target. A kernel that mounts no files answers ENOTBLK.
func Mount(source, target string, o Options) error {
	data, err := o.data()
	if err != nil {
		return err
	}
	if err := unix.Mount(source, target, FSType, unix.MS_RDONLY|o.Flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w%s", source, target, err, advice(err))
	}
	return nil
}

// advice says what an errno of mount(2) means here. The kernel gives its reason
// in its log only.
func advice(err error) string {
	switch {
	case errors.Is(err, unix.ENODEV):
		return ": this kernel has no erofs; load the module (modprobe erofs)"
	case errors.Is(err, unix.EPERM):
		return ": mounting with the kernel's erofs takes root (CAP_SYS_ADMIN in the first user namespace); --backend=fuse does not"
	case errors.Is(err, unix.EBADMSG):
		return ": the checksum of the image's superblock is wrong: the image is damaged, or not whole"
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EUCLEAN):
		return ": the kernel's erofs finds this image wrong, or of a kind that it does not know; dmesg has the reason"
	case errors.Is(err, unix.EOPNOTSUPP):
		return ": this kernel's erofs lacks what the image needs, such as a compression algorithm; dmesg has the reason"
	}
	return ""
}
