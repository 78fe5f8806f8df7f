package client

import (
	"context"
	"net/http"

	"github.com/tinevm/tine/internal/wire"
)

// Images.
type (
	// Image is a root file system, a kernel and an initramfs.
	Image = wire.Image
	// BuildImageRequest says what image to build.
	BuildImageRequest = wire.BuildImageRequest
)

// Images lists the images, by name.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	return get[[]Image](ctx, c, "/v1/images", nil)
}

// Image describes an image, found by name or digest.
func (c *Client) Image(ctx context.Context, ref string) (Image, error) {
	return get[Image](ctx, c, "/v1/images"+segments(ref), nil)
}

// BuildImage builds an image, or finds that it is built. report, which may be
// nil, is told how it goes.
func (c *Client) BuildImage(ctx context.Context, req BuildImageRequest, report func(Progress)) (Image, error) {
	return longCall[Image](ctx, c, "/v1/images", req, report)
}

// RemoveImage removes an image.
func (c *Client) RemoveImage(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, "/v1/images"+segments(name), nil, nil, nil)
}
