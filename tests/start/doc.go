// Package start has the start of a program from a container image, as proof and for
// the benchmark of the same name: a Debian root in a registry at the end of a link of
// 20 ms and 25 MB/s, a mount of it, and
//
//	chroot DIR python3 -c 'import json, ssl, decimal, asyncio, …'
//
// which reads some 200 files all over the image, most of them one after the other, as
// programs do: each waits for the one before.
//
//	s, err := start.NewSite(ctx, start.Options{Dir: dir, Binary: binary})
//	defer s.Close()
//	err = s.Build(ctx, root, "v1")  // root of package debian; an EROFS image as HOST/debian/python:v1
//	m, err := s.Mount(ctx, "v1", start.MountOptions{Backend: "fuse", Cache: cache})
//	took, err := start.Python(ctx, m.Dir)
//	err = m.Unmount(ctx)
//
// Whoever wants two runs to read the same puts server and program on one core, each
// with Options.OneCore or PythonOnOneCore: what they do then is in one order. The
// registry is in the caller's process and keeps the other cores.
package start
