package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// needs are the findings that decide which backends work.
func (h *host) needs() []Finding {
	return slices.Concat(
		[]Finding{h.rootRight(), h.nbdDriver()}, h.nbdNodes(),
		[]Finding{h.kernelErofs(), h.imageFiles()}, h.fuseDevice(),
		[]Finding{h.fuseRight()})
}

// extras are findings that do not decide it.
func (h *host) extras() []Finding {
	return slices.Concat([]Finding{h.compressors()}, h.features(), []Finding{h.userNamespaces()}, h.allowOther(), []Finding{h.overlay()})
}

func (h *host) rootRight() Finding {
	f := Finding{For: []string{NBD, FILE}, Status: Missing}
	switch {
	case h.root():
		return Finding{For: f.For, Status: OK, What: "root (CAP_SYS_ADMIN in the first user namespace)"}
	case !h.initial:
		f.What = "in a user namespace the kernel's EROFS may not be mounted, not even by its root"
		f.Do = "run as root outside of it"
	case h.euid == 0:
		f.What = "this root has no CAP_SYS_ADMIN"
		f.Do = "give the container the capability (--cap-add SYS_ADMIN, or --privileged)"
	default:
		f.What = fmt.Sprintf("not root (uid %d)", h.euid)
		f.Do = "run as root"
	}
	return f
}

// packedApart is a hint about modules that are not there.
const packedApart = "some distributions pack it apart (linux-modules-extra, kernel-modules-extra); in a container, load it on the host"

func (h *host) nbdDriver() Finding {
	f := Finding{For: []string{NBD}, Status: OK}
	loaded, installed := h.exists("sys/module/nbd"), false
	if !loaded {
		installed = h.loadable("nbd")
	}
	var netlink error
	if loaded && h.NBDFamily != nil {
		netlink = h.NBDFamily()
	}
	switch {
	case netlink != nil:
		f.Status, f.What = Warning, fmt.Sprintf("the nbd driver is there, but not by netlink (%v): its devices end with their server", netlink)
		f.Do = "use the host's network namespace and permit netlink sockets, for mounts that survive their server"
	case loaded:
		f.What = "the nbd driver"
	case installed && h.can(unix.CAP_SYS_MODULE):
		f.What = "the nbd module is installed, and is loaded when it is needed"
	case installed:
		f.Status, f.What, f.Do = Missing, "the nbd module is not loaded, and this process may not load it", "modprobe nbd, as root"
	default:
		f.Status, f.What = Missing, "the nbd module is neither loaded nor to be found for "+h.release
		f.Do = "modprobe nbd; " + packedApart
	}
	return f
}

// nbdNodes finds nothing where /dev is the kernel's own.
func (h *host) nbdNodes() []Finding {
	if h.deviceTree || h.exists("dev/nbd0") {
		return nil
	}
	return []Finding{{For: []string{NBD}, Status: Missing, What: "/dev has no nbd devices, and is not the kernel's (devtmpfs)",
		Do: "give the container the host's /dev (-v /dev:/dev, with --privileged)"}}
}

func (h *host) kernelErofs() Finding {
	f := Finding{For: []string{NBD, FILE}, Status: OK, What: "the kernel's EROFS"}
	switch {
	case h.has("erofs"):
	case h.loadable("erofs"):
		f.What = "the erofs module is installed, and is loaded when it is needed"
	default:
		f.Status, f.What = Missing, "the kernel's EROFS is neither there nor to be found for "+h.release
		f.Do = "modprobe erofs; " + packedApart
	}
	return f
}

// imageFiles asks how the kernel can mount what is not a block device.
func (h *host) imageFiles() Finding {
	f := Finding{For: []string{FILE}, Status: OK}
	const option = "CONFIG_EROFS_FS_BACKED_BY_FILE"
	config := h.config()
	direct := h.atLeast(6, 12) && (config == nil || config[option] == "y")
	loop := h.Device("/dev/loop-control")
	switch {
	case direct:
		f.What = fmt.Sprintf("Linux %d.%d mounts EROFS from files", h.major, h.minor)
	case loop == nil:
		f.What = "loop devices"
	default:
		f.Status, f.What = Missing, fmt.Sprintf("this kernel mounts no files (that takes Linux 6.12 with %s), and there are no loop devices (%v)", option, loop)
		f.Do = "modprobe loop, or give the container /dev/loop-control"
	}
	return f
}

// fuseDevice is about /dev/fuse. Who may not open it may have a helper that can.
func (h *host) fuseDevice() []Finding {
	users := []string{FILE, FUSE}
	err := h.Device("/dev/fuse")
	if err == nil {
		return []Finding{{For: users, Status: OK, What: "/dev/fuse"}}
	}
	f := Finding{For: users, Status: Missing, What: fmt.Sprintf("FUSE (%v)", err),
		Do: "modprobe fuse, or give the container the device (--device /dev/fuse)"}
	if !errors.Is(err, fs.ErrPermission) {
		return []Finding{f}
	}
	f.Do = "chmod 666 /dev/fuse, or give the container the device (--device /dev/fuse)"
	if _, reason := h.helper(); reason == "" {
		f.For = []string{FILE}
	}
	return []Finding{f}
}

// direct tells whether mount(2) of a FUSE file system is permitted: to root, and
// to the root of a user namespace since Linux 4.18.
func (h *host) direct() bool { return h.can(unix.CAP_SYS_ADMIN) && h.mountsOurs }

func (h *host) fuseRight() Finding {
	f := Finding{For: []string{FUSE}, Status: OK}
	if h.direct() {
		f.What = "the right to mount FUSE"
		return f
	}
	name, reason := h.helper()
	if reason == "" {
		f.What = name + " mounts FUSE for plain users"
		return f
	}
	f.Status, f.What = Missing, "no right to mount, and "+reason
	f.Do = "install fuse3, or run in a user namespace of your own (unshare -Urm), or give the container CAP_SYS_ADMIN"
	return f
}

// helper is the program that Fusermount takes, or the reason why it could not
// mount.
func (h *host) helper() (name, reason string) {
	for _, candidate := range []string{"fusermount3", "/bin/fusermount3", "fusermount", "/bin/fusermount"} {
		found, err := h.LookPath(candidate)
		if err != nil {
			continue
		}
		st, err := stat(h.Files, strings.TrimPrefix(path.Clean(found), "/"))
		switch {
		case err != nil:
			return "", fmt.Sprintf("%s: %v", found, err)
		case st.Mode&unix.S_ISUID == 0 || st.Uid != 0:
			return "", found + " is not setuid root"
		case h.noNewPrivs:
			return "", found + " gets no rights here (no_new_privs)"
		case h.bounding>>unix.CAP_SYS_ADMIN&1 == 0:
			return "", found + " gets no rights here (CAP_SYS_ADMIN is not in the bounding set)"
		}
		return found, ""
	}
	return "", "fusermount3 is not installed"
}

// A compressor is an algorithm of EROFS, its option, and the kernel that it came
// with.
type compressor struct {
	name, option string
	major, minor int
}

func compressorsOfErofs() []compressor {
	return []compressor{
		{"lz4", "CONFIG_EROFS_FS_ZIP", 5, 3},
		{"lzma", "CONFIG_EROFS_FS_ZIP_LZMA", 5, 16},
		{"deflate", "CONFIG_EROFS_FS_ZIP_DEFLATE", 6, 6},
		{"zstd", "CONFIG_EROFS_FS_ZIP_ZSTD", 6, 10},
	}
}

// compressors says which images the kernel's EROFS can read.
func (h *host) compressors() Finding {
	config := h.config()
	f := Finding{For: []string{NBD, FILE}, Status: OK}
	var has, lacks []string
	for _, c := range compressorsOfErofs() {
		if h.atLeast(c.major, c.minor) && (config == nil || config[c.option] == "y") {
			has = append(has, c.name)
		} else {
			lacks = append(lacks, c.name)
		}
	}
	how := ""
	if config == nil {
		how = ", by its version; how it was built is not to be read"
	}
	f.What = fmt.Sprintf("the kernel's EROFS reads uncompressed images and %s%s", inWords(has), how)
	if len(lacks) > 0 {
		f.Status, f.What = Warning, fmt.Sprintf("%s, but not %s", f.What, inWords(lacks))
		f.Do = "mount such images with --backend=fuse"
	}
	return f
}

func inWords(names []string) string {
	if len(names) == 0 {
		return "nothing else"
	}
	return strings.Join(names, ", ")
}

// features says which parts of the format the kernel's EROFS does not know
// (fs/erofs/sysfs.c), once it is loaded.
func (h *host) features() []Finding {
	if !h.exists("sys/fs/erofs/features") {
		return nil
	}
	var lacks []string
	for _, name := range []string{
		"zero_padding", "compr_cfgs", "big_pcluster", "chunked_file", "device_table", "compr_head2", "sb_chksum",
		"ztailpacking", "fragments", "dedupe", "48bit", "metabox",
	} {
		if !h.exists("sys/fs/erofs/features/" + name) {
			lacks = append(lacks, name)
		}
	}
	if len(lacks) == 0 {
		return nil
	}
	return []Finding{{For: []string{NBD, FILE}, Status: Warning, What: "the kernel's EROFS does not know " + inWords(lacks),
		Do: "mount images that have these with --backend=fuse"}}
}

// userNamespaces are where plain users may mount without a helper.
func (h *host) userNamespaces() Finding {
	f := Finding{For: []string{FUSE}, Status: Warning}
	restricted, err := h.line("proc/sys/kernel/apparmor_restrict_unprivileged_userns")
	switch {
	case !h.exists("proc/self/ns/user"):
		f.What, f.Do = "this kernel has no user namespaces", "use fusermount3"
	case h.forbidden("user/max_user_namespaces"):
		f.What, f.Do = "user namespaces are forbidden", "sysctl user.max_user_namespaces=10000, or use fusermount3"
	case h.forbidden("kernel/unprivileged_userns_clone"):
		f.What, f.Do = "user namespaces are forbidden to plain users", "sysctl kernel.unprivileged_userns_clone=1, or use fusermount3"
	case err == nil && restricted != "0":
		f.What = "AppArmor lets plain users do nothing in their user namespaces"
		f.Do = "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or use fusermount3"
	default:
		f.Status, f.What = OK, "user namespaces, where everybody may mount FUSE (unshare -Urm)"
	}
	return f
}

// allowOther is asked where the helper would mount.
func (h *host) allowOther() []Finding {
	if h.direct() {
		return nil
	}
	b, err := fs.ReadFile(h.Files, "etc/fuse.conf")
	if err == nil {
		for line := range strings.Lines(string(b)) {
			if strings.TrimSpace(line) == "user_allow_other" {
				return []Finding{{For: []string{FUSE}, Status: OK, What: "-o allow_other is permitted to plain users"}}
			}
		}
	}
	return []Finding{{For: []string{FUSE}, Status: Warning, What: "-o allow_other is not permitted to plain users: others cannot read what they mount",
		Do: "add the line user_allow_other to /etc/fuse.conf"}}
}

func (h *host) overlay() Finding {
	f := Finding{For: byPreference(), Status: OK, What: "overlayfs, for --overlay and --tmpfs-overlay, and for images of several layers with nbd and file"}
	if !h.has("overlay") && !h.loadable("overlay") {
		f.Status, f.What = Warning, "overlayfs is not to be found: no --overlay and --tmpfs-overlay, and images of several layers with fuse only"
		f.Do = "modprobe overlay"
	}
	return f
}
