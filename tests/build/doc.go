// Package build proves the commands build, convert, push and diff against real input and other people's tools.
//
// A Debian, packed by umoci into five layers that delete, replace, cover and link what the ones below have, is carried
// around by skopeo and served by docker-registry. What umoci unpacks of it is what every image that is made of it has
// to show: mounted by the kernel, mounted through the program, and to the program's own diff, which is believed
// nothing that a walk by system calls does not say, too. fsck.erofs of erofs-utils has to have no complaint.
//
// The other half is what goes wrong: sources that are not there or are not what they say, disks that are full,
// registries that refuse, break off or die, and a user who has had enough. Each ends in one line and an exit code, and
// leaves nothing behind.
//
// There is nothing here but tests. They run the program itself, built once.
package build
