package backend

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// MountOptions are the parsed form of -o, as mount(8) has it.
type MountOptions struct {
	// Flags are MS_* bits beside MS_RDONLY, which is always set.
	Flags uintptr
	// Words are the same options as words, for helpers that take words.
	Words []string
	// AllowOther lets other users than the one who mounts into a FUSE mount.
	AllowOther bool
}

type mountFlag struct {
	bit uintptr
	set bool
}

// generic are the options of mount(8) that are the same for each file system.
func generic() map[string]mountFlag {
	return map[string]mountFlag{
		"suid":        {unix.MS_NOSUID, false},
		"nosuid":      {unix.MS_NOSUID, true},
		"dev":         {unix.MS_NODEV, false},
		"nodev":       {unix.MS_NODEV, true},
		"exec":        {unix.MS_NOEXEC, false},
		"noexec":      {unix.MS_NOEXEC, true},
		"atime":       {unix.MS_NOATIME, false},
		"noatime":     {unix.MS_NOATIME, true},
		"diratime":    {unix.MS_NODIRATIME, false},
		"nodiratime":  {unix.MS_NODIRATIME, true},
		"relatime":    {unix.MS_RELATIME, true},
		"norelatime":  {unix.MS_RELATIME, false},
		"strictatime": {unix.MS_STRICTATIME, true},
		"nosymfollow": {msNoSymFollow, true},
	}
}

// msNoSymFollow is MS_NOSYMFOLLOW of linux/mount.h (5.10).
const msNoSymFollow = 0x100

// ParseMountOptions reads the words of -o. Later words win over earlier ones.
func ParseMountOptions(options []string) (MountOptions, error) {
	var o MountOptions
	known := generic()
	for _, list := range options {
		for word := range strings.SplitSeq(list, ",") {
			if f, ok := known[word]; ok {
				o.Flags &^= f.bit
				if f.set {
					o.Flags |= f.bit
				}
				o.Words = append(o.Words, word)
				continue
			}
			switch {
			case word == "allow_other":
				o.AllowOther = true
			case word == "rw":
				return o, fmt.Errorf("mount option %q: an EROFS image is read-only; leave it out", word)
			case word == "remount":
				return o, fmt.Errorf("mount option %q: a running mount cannot be changed; unmount it and mount it anew", word)
			case ignored(word):
			default:
				return o, fmt.Errorf("mount option %q is not known; see erofs-oci mount --help", word)
			}
		}
	}
	return o, nil
}

// ignored tells the words that mount(8) and fstab(5) use among themselves, and
// those that say what is the case anyway.
func ignored(word string) bool {
	switch word {
	case "", "ro", "defaults", "default_permissions", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group":
		return true
	}
	return strings.HasPrefix(word, "x-") || strings.HasPrefix(word, "X-") || strings.HasPrefix(word, "comment=")
}
