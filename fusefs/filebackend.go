package fusefs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

// FileBackend mounts with the kernel's EROFS, on blobs that are served as files
// over FUSE:
//
//	target            erofs, the only mount that anybody sees
//	                    │ the files, held open by its superblock
//	(attached nowhere) fuse  erofs-oci.blob, erofs-oci.device1 …
//	                    │ connection
//	this process      blobFiles ── Source
//
// The FUSE file system never has a directory. Whoever unmounts target, by
// umount(8) or otherwise, closes the files and thereby ends the connection and
// the server; there is nothing else to clean up, not even by SIGKILL.
//
// An address of the image that leads past the end of its blob is EIO, as the files
// have no end (see blobFiles). A loop device has: it is as long as the blob, since
// what probes devices (blkid, udev) reads their last sectors. Past its end file data
// is EIO, too, and metadata zeros (fs/buffer.c block_read_full_folio).
//
// It takes root and Linux 5.2 for mounting in no place (fsmount(2)). When the
// server is killed, the kernel answers from its page cache, and all else with
// EIO or, for metadata, ENOTCONN, until target is unmounted.
type FileBackend struct {
	mountFile mountFunc // kmount.MountFile if nil
}

type mountFunc func(file, target string, o kmount.Options) (device string, err error)

// Mount mounts the image in v on target.
func (b FileBackend) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	whole, err := CheckVolume(ctx, v)
	if err != nil {
		return nil, err
	}
	files, err := serveBlobs(v, whole, o)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, files.end)
	err = backend.Apart(func() error { return files.mountOver(b.mountFile, target, o) })
	// From here on the mount alone holds the files.
	err = errors.Join(err, unix.Close(files.tree))
	if err != nil {
		files.end()
		<-files.done
		return nil, errors.Join(context.Cause(ctx), err)
	}
	id, err := backend.MountedDevice(target, kmount.FSType)
	if err == nil && !stop() {
		// The reads have ended with ctx: what was mounted is of no use.
		err = errors.Join(context.Cause(ctx), backend.Detach(target, id, true))
	}
	if err != nil {
		files.end()
		return nil, err
	}
	return &mount{target: target, device: id, log: orNone(o.Log), done: files.done}, nil
}

// CheckVolume has our own reader look at an image that the kernel will read, since
// it says more than an errno. What it does not know the kernel may. It refuses an
// image that is longer than its blob, which the kernel would read zeros from.
//
// whole says that no block of the image lies across the end of a source.
func CheckVolume(ctx context.Context, v backend.Volume) (whole bool, err error) {
	if err := v.OneLayer(); err != nil {
		return false, err
	}
	im, err := OpenImage(ctx, v, erofsfmt.Options{})
	if errors.Is(err, erofsfmt.ErrUnsupported) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	sb := im.Super()
	if size := v.Primary.Size(); sb.Blocks > uint64(size>>sb.BlockBits) {
		return false, fmt.Errorf("the image says that it has %d blocks of %d bytes, and the blob ends after %d bytes: it was cut off", sb.Blocks, sb.BlockSize(), size)
	}
	whole = sb.Blocks > 0 || v.Primary.Size()%sb.BlockSize() == 0
	for i, d := range v.Devices {
		blocks, size := sb.Devices[i].Blocks, d.Size()
		if blocks > uint64(size>>sb.BlockBits) {
			return false, fmt.Errorf("the image says that its device %d has %d blocks of %d bytes, and the blob ends after %d bytes: it was cut off",
				i+1, blocks, sb.BlockSize(), size)
		}
		whole = whole && (blocks > 0 || size%sb.BlockSize() == 0)
	}
	return whole, nil
}

// ForKernel leaves out those layers that the kernel's overlayfs would show although a
// higher one hides them: it takes no root directory for opaque. It reads what is needed
// to open each layer, of all layers side by side.
func ForKernel(ctx context.Context, v backend.Volume) (backend.Volume, error) {
	im, err := OpenImage(ctx, v, erofsfmt.Options{})
	if err != nil {
		return v, err
	}
	v.Below = v.Below[:im.RootLayers()-1]
	return v, nil
}

// servedBlobs are the sources of a volume as files of a FUSE mount.
type servedBlobs struct {
	sizes []int64
	tree  int             // the mount: while this descriptor is open, there are paths to the files
	end   func()          // fails the reads that are under way and all to come
	done  <-chan struct{} // closed when the kernel has ended the connection
}

func serveBlobs(v backend.Volume, whole bool, o backend.Options) (*servedBlobs, error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, noDevice(err)
	}
	tree, err := mountNowhere(dev)
	if err != nil {
		return nil, errors.Join(err, unix.Close(dev))
	}
	log := orNone(o.Log)
	life, end := context.WithCancel(context.Background())
	files := newBlobFiles(life, v, whole, log)
	files.failed = o.Failed
	done, err := serve(files, dev, log, true, end)
	if err != nil {
		end()
		return nil, errors.Join(err, unix.Close(tree))
	}
	s := &servedBlobs{sizes: []int64{v.Primary.Size()}, tree: tree, end: end, done: done}
	for _, d := range v.Devices {
		s.sizes = append(s.sizes, d.Size())
	}
	return s, nil
}

// mountNowhere makes a FUSE mount of the connection dev that is not attached to
// any directory. It ends with the descriptor and with the files open in it.
func mountNowhere(dev int) (tree int, err error) {
	f, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("make a file system of the blob: fsopen: %w%s", err, nowhereAdvice(err))
	}
	defer unix.Close(f)
	for _, option := range [][2]string{
		{"source", "erofs-oci"},
		{"fd", strconv.Itoa(dev)},
		{"rootmode", "40000"},
		{"user_id", strconv.Itoa(os.Geteuid())},
		{"group_id", strconv.Itoa(os.Getegid())},
		{"max_read", strconv.Itoa(maxRead)},
	} {
		if err := unix.FsconfigSetString(f, option[0], option[1]); err != nil {
			return -1, fmt.Errorf("make a file system of the blob: fsconfig %s=%s: %w", option[0], option[1], err)
		}
	}
	if err := unix.FsconfigCreate(f); err != nil {
		return -1, fmt.Errorf("make a file system of the blob: fsconfig: %w%s", err, nowhereAdvice(err))
	}
	tree, err = unix.Fsmount(f, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("make a file system of the blob: fsmount: %w%s", err, nowhereAdvice(err))
	}
	return tree, nil
}

func nowhereAdvice(err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return ": it takes root (CAP_SYS_ADMIN in the first user namespace); --backend=fuse does not"
	case errors.Is(err, unix.ENOSYS):
		return ": it takes Linux 5.2, and a container that is let use it; --backend=fuse does not"
	}
	return ""
}

// path is where the kernel finds source i when this process asks it to.
func (s *servedBlobs) path(i int) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", s.tree, blobName(i))
}

// mountOver mounts the kernel's EROFS on the files.
func (s *servedBlobs) mountOver(mountFile mountFunc, target string, o backend.Options) error {
	if mountFile == nil {
		mountFile = kmount.MountFile
	}
	if err := forgoPoll(s.path(0)); err != nil {
		return fmt.Errorf("open the served blob: %w", err)
	}
	over := kmount.Options{Flags: o.Flags.Flags, Sizes: s.sizes}
	for i := 1; i < len(s.sizes); i++ {
		over.Devices = append(over.Devices, s.path(i))
	}
	_, err := mountFile(s.path(0), target, over)
	return err
}

// forgoPoll has the kernel ask, once and for all, whether files of this mount can
// be polled. Else os.Open makes it ask, by an epoll_ctl(2) that the scheduler does
// not see as a wait: with GOMAXPROCS=1 nobody would be left to answer.
func forgoPoll(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err
}
