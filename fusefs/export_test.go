package fusefs

import "github.com/erofs-oci/erofs-oci/backend/kmount"

// MountingBy is a FileBackend with another kmount.MountFile.
func MountingBy(f func(file, target string, o kmount.Options) (device string, err error)) FileBackend {
	return FileBackend{mountFile: f}
}
